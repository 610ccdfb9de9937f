"""What a safetensors file says of itself before its tensors; nothing is loaded, and all of it has to agree."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pocketfusion.bounded import parse_json
from pocketfusion.errors import PocketfusionError

_HEADER_LIMIT = 100 << 20  # the format's own limit on its JSON header
#: Bits an element of the format's types.
_BITS = {
    **{"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8},
    **{"U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64, "U64": 64, "I64": 64, "F64": 64},
}


def read_safetensors_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors of a safetensors file (name → dtype, shape, data_offsets) and the offset at which their data begins.

    The format: 8 bytes with the header's length, little-endian, the header as JSON, the tensors one behind the other.
    Raises PocketfusionError if the file is truncated, not of this format, or its header contradicts itself.
    """
    return read_safetensors(file)[1:]


def read_safetensors(file: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]], int]:
    """As `read_safetensors_header`, with what the file says of itself before it: its metadata."""
    if not file.is_file():
        raise PocketfusionError(f"{file} is no regular file: restore it from its source")
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise PocketfusionError(f"{file} is truncated or not a safetensors file: restore it from its source")
        content = f.read(length)
    try:
        header = parse_json(content)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no text")
        end = _end(header)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f" ({error})" if isinstance(error, ValueError) else ""
        raise PocketfusionError(f"{file} has a damaged header{reason}: restore it from its source") from None
    if 8 + length + end != size:
        what = "truncated" if 8 + length + end > size else "longer than its tensors"
        raise PocketfusionError(f"{file} is {what}: it has {size:,} of {8 + length + end:,} bytes; restore it")
    return metadata, header, 8 + length


def _end(header: dict[str, dict[str, Any]]) -> int:
    """Where the last tensor ends; ValueError unless the tensors lie one behind the other, each as large as its shape
    and type say."""
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if set(tensor) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{name} has keys beside its type, shape and place")
        (begin, stop), shape = tensor["data_offsets"], tensor["shape"]
        if any(type(number) is not int or number < 0 for number in (begin, stop, *shape)):
            raise ValueError(f"{name} has a shape or place that is none")
        if begin != end:
            raise ValueError(f"{name} begins at byte {begin}, not behind the tensor before it at {end}")
        if tensor["dtype"] not in _BITS:
            raise ValueError(f"{name} is of the unknown type {tensor['dtype']!r}")
        bits = _BITS[tensor["dtype"]] * math.prod(shape)
        if bits != 8 * (stop - begin):
            raise ValueError(f"{name} of shape {shape} and type {tensor['dtype']} has {stop - begin:,} bytes")
        end = stop
    return end
