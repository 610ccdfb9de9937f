"""`.mlpackage` folders: written without chance in their names, read as protobufs, constants wherever they lie."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet

_ROOT = "Data/com.apple.CoreML"
MODEL, WEIGHTS, CONTENTS = f"{_ROOT}/model.mlmodel", f"{_ROOT}/weights/weight.bin", "Manifest.json"
#: MIL's types by their numbers in its protobuf: what numpy reads of their bytes, and the blob reader's name of them.
FLOAT16 = 10
_TYPES: dict[int, tuple[str, str]] = {
    FLOAT16: ("<f2", "fp16"),
    11: ("<f4", "float"),
    21: ("i1", "int8"),
    22: ("<i2", "int16"),
    23: ("<i4", "int32"),
    31: ("u1", "uint8"),
    32: ("<u2", "uint16"),
    33: ("<u4", "uint32"),
}
#: Those of less than a byte, packed lowest bits first: name, bits, if they have a sign.
_SMALL: dict[int, tuple[str, int, bool]] = {
    25: ("int4", 4, True),
    35: ("uint4", 4, False),
    36: ("uint2", 2, False),
    37: ("uint1", 1, False),
    38: ("uint6", 6, False),
    39: ("uint3", 3, False),
}
_BOOL, _STRING = 1, 2


def save(model: Any, path: Path) -> None:
    """Writes coremltools' `model` at `path`, atomically: the same network gives the same bytes."""
    with atomic_folder(path, overwrite=True) as partial:
        with quiet():
            model.save(str(made := partial / "model.mlpackage"))
        for file in (MODEL, WEIGHTS):
            if (made / file).is_file():  # a network without large weights has no such file
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                (made / file).rename(partial / file)
        contents = json.loads((made / CONTENTS).read_text())
        (partial / CONTENTS).write_text(json.dumps(_named(contents), indent=2, sort_keys=True) + "\n")
        shutil.rmtree(made)


def _named(contents: dict[str, Any]) -> dict[str, Any]:
    """A package's list of its items, by names that follow from their paths; without torch.export's debugging notes."""
    names = {key: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])).upper() for key, item in _items(contents)}
    items = {names[key]: item for key, item in _items(contents)}
    return {
        **contents,
        "itemInfoEntries": items,
        "rootModelIdentifier": names[contents["rootModelIdentifier"]],
    }


def _items(contents: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    kept = ("com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights")
    return ((key, item) for key, item in contents["itemInfoEntries"].items() if item["path"] in kept)


def files(package: Path) -> list[Path]:
    """The package's files, the program first."""
    return [file for file in (package / name for name in (MODEL, WEIGHTS, CONTENTS)) if file.is_file()]


def size(package: Path) -> int:
    """Its files' bytes."""
    return sum(file.stat().st_size for file in files(package))


def copy(package: Path, path: Path) -> None:
    """The package at another place too."""
    shutil.copytree(package, path)


def remove(package: Path) -> None:
    """Removes it."""
    shutil.rmtree(package)


def read_spec(package: Path) -> Any:
    """The package's protobuf; raises PocketfusionError if it is missing, damaged or no ML Program."""
    with quiet():
        from coremltools.proto import Model_pb2
    try:
        spec = Model_pb2.Model.FromString((package / MODEL).read_bytes())
    except OSError as error:
        raise PocketfusionError(f"{package / MODEL} cannot be read ({error.strerror}): restore the package") from None
    except Exception:  # protobuf's DecodeError
        raise PocketfusionError(f"{package / MODEL} is damaged: restore it from its source") from None
    if spec.WhichOneof("Type") != "mlProgram" or "main" not in spec.mlProgram.functions:
        raise PocketfusionError(f"{package} is no ML Program: export the model again")
    return spec


def read_program(package: Path) -> tuple[Any, Any]:
    """The package's main function and the block of its operations; raises PocketfusionError as above."""
    function = read_spec(package).mlProgram.functions["main"]
    if function.opset not in function.block_specializations:
        raise PocketfusionError(f"{package} has no operations for its own version {function.opset!r}: restore it")
    return function, function.block_specializations[function.opset]


class Constants:
    """A package's constants: in its program, or in its file of weights."""

    def __init__(self, package: Path) -> None:
        self._file, self._reader = package / WEIGHTS, None

    def value(self, value: Any) -> Any:
        """`value` as a float32, integer or bool tensor, or as text. Raises PocketfusionError if it cannot be read."""
        kind = value.type.tensorType
        shape = [int(one.constant.size) for one in kind.dimensions]
        try:
            if value.WhichOneof("value") == "blobFileValue":
                return self._stored(kind.dataType, value.blobFileValue.offset).reshape(shape)
            return _immediate(kind.dataType, value.immediateValue.tensor, shape)
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            raise PocketfusionError(
                f"{self._file} is damaged, or stores a constant that this version cannot read ({reason}): restore it"
            ) from None

    def _stored(self, kind: int, offset: int) -> Tensor:
        if self._reader is None:
            if not self._file.is_file():
                raise PocketfusionError(f"{self._file} is missing: restore the package from its source")
            with quiet():
                from coremltools.libmilstoragepython import _BlobStorageReader

            self._reader = _BlobStorageReader(str(self._file))
        if kind in _SMALL:
            name, _, signed = _SMALL[kind]
            raw = getattr(self._reader, f"read_{name}_data")(offset)  # a byte each: the reader has unpacked them
            return _tensor(np.frombuffer(raw.tobytes(), np.int8 if signed else np.uint8))
        layout, name = _TYPES[kind]
        raw = getattr(self._reader, f"read_{name}_data")(offset)
        return _tensor(np.frombuffer(raw.tobytes(), layout))


def _immediate(kind: int, tensor: Any, shape: list[int]) -> Any:
    which = tensor.WhichOneof("value")
    if which == "strings":
        (text,) = tensor.strings.values
        return text
    if which == "bytes":
        raw = tensor.bytes.values
        if kind in _SMALL:
            unpacked = _unpacked(np.frombuffer(raw, np.uint8), *_SMALL[kind][1:])
            return unpacked[: int(np.prod(shape))].reshape(shape)
        return _tensor(np.frombuffer(raw, _TYPES[kind][0])).reshape(shape)
    values = np.array(getattr(tensor, which).values if which else [])
    return _tensor(values.astype(bool if kind == _BOOL else _TYPES[kind][0])).reshape(shape)


def _tensor(values: np.ndarray) -> Tensor:
    """Floats as float32, other integers than int8 and uint8 as int32: all that torch computes with."""
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32))
    return torch.from_numpy(values.astype(np.int32) if values.dtype.itemsize > 1 else values.copy())


def _unpacked(raw: np.ndarray, bits: int, signed: bool) -> Tensor:
    ones = np.unpackbits(raw, bitorder="little")
    rows = ones[: len(ones) // bits * bits].reshape(-1, bits)
    values = (rows.astype(np.int16) << np.arange(bits, dtype=np.int16)).sum(1)
    if signed:
        values = np.where(values >= 1 << bits - 1, values - (1 << bits), values)
    return torch.from_numpy(values.astype(np.int8 if signed else np.uint8))
