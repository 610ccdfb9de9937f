"""A `.tflite` file verified before native code sees it.

LiteRT trusts much of what a file says: an activation's declared shape that its operation does not make, too few scales
for a weight's channels or a stride of 0 end in memory that is not the tensor's. So the whole file is read here first:
offsets in bounds, nothing that the exporter does not write, constants as large as their shapes say, every tensor made
before it is used, and of the shape that its operation makes (`operations`). No cheaper way is safe: a first run in a
process of its own would find what crashes, not what reads or writes elsewhere and lives.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from struct import unpack_from
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.specs import Network, TensorSpec
from pocketfusion.runtime.trust.flat import Flat, Kind, Unsound
from pocketfusion.runtime.trust.operations import Operation, Quantization, Tensor
from pocketfusion.runtime.trust.schema import BITS, NAMES, RULES, SETTINGS, TYPES

#: Entries of a file's metadata that LiteRT may be shown: others switch on paths that nothing here knows.
#: The last one where a network came out of the converter with its weights behind the flatbuffer, as above 2 GB.
_METADATA = (b"min_runtime_version", b"keep_stablehlo_constant", b"buffer_location")
_MAX_RANK = 6
_MAX_ELEMENTS = 2**31 - 1
_SMALL = 16  #: integers of a constant that tells a shape


#: Type and shape of a signature's tensors, by name.
Named = Mapping[str, "tuple[str, tuple[int, ...]]"]


@dataclass(frozen=True)
class Verified:
    """What a sound file computes: its signature's name, tensors by name (type and shape) and the most bytes that its
    activations take at once."""

    signature: str
    inputs: Named
    outputs: Named
    live: int


def verify(path: Path, spec: Network) -> str:
    """The name of the signature that computes what `spec` says, in a file that is sound.

    Raises PocketfusionError if the file is damaged or was not written by the exporter, computes something else or
    needs more memory than the machine has.
    """
    try:
        status = path.stat()
        found = _read(path, (status.st_ino, status.st_size, status.st_mtime_ns))
    except (Unsound, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PocketfusionError(f"LiteRT cannot load {path} ({reason}): export the bundle again") from None
    for given, wanted in ((found.inputs, spec.inputs), (found.outputs, spec.outputs)):
        if dict(given) != {tensor.name: (tensor.dtype, tuple(tensor.shape)) for tensor in wanted}:
            raise PocketfusionError(
                f"{path} has no signature with the inputs and outputs that its manifest names "
                f"({', '.join(map(_words, (*spec.inputs, *spec.outputs)))}): export the bundle again"
            )
    if found.live > (memory := _memory()):
        raise PocketfusionError(
            f"{path} needs {found.live / 1e6:,.0f} MB for its activations and this process may have "
            f"{memory / 1e6:,.0f} MB: take a bundle of smaller pictures or a machine with more memory"
        )
    return found.signature


@lru_cache(maxsize=16)
def _read(path: Path, identity: tuple[int, ...]) -> Verified:
    """`read_verified`, once for a file that does not change: some modes load a network again for every prompt."""
    return read_verified(path)


def read_verified(path: Path) -> Verified:
    """Reads all of the file; raises `Unsound` with what is wrong with it, or OSError."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise Unsound("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
            return _File(Flat(data)).read()


def _words(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.shape} {tensor.dtype}"


def _memory() -> int:
    """Bytes that this process may have: the machine's, or the limit that was set for it."""
    limits = [2**62]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        import resource
    except ImportError:  # Windows
        return min(limits)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(*limits, limit) if limit != resource.RLIM_INFINITY else min(limits)


#: The schema's tables (tensorflow/compiler/mlir/lite/schema/schema.fbs), without what the exporter never writes.
_MODEL = Kind(("I", 0), "at", "at", "at", "at", "at", "at", "at")
_CODE = Kind(("b", 0), "at", ("i", 1), ("i", 0))
_GRAPH = Kind("at", "at", "at", "at", "at", ("i", -1))
_TENSOR = Kind("at", ("b", 0), ("I", 0), "at", "at", ("B", 0), None, "at", ("B", 0))
_QUANTIZATION = Kind("at", "at", "at", "at", ("B", 0), None, ("i", 0))
_BUFFER = Kind("at", ("Q", 0), ("Q", 0))
_OPERATOR = Kind(
    ("I", 0), "at", "at", ("B", 0), "at", "at", ("b", 0), "at", "at", ("Q", 0), ("Q", 0), ("B", 0), None, ("i", -1)
)
_METADATA_ENTRY = Kind("at", ("I", 0))
_SIGNATURE = Kind("at", "at", "at", None, ("I", 0))
_TENSOR_MAP = Kind("at", ("I", 0))


class _File:
    """One file's model, with a single graph and signature as the exporter writes."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat

    def read(self) -> Verified:
        flat = self.flat
        _, codes, graphs, about, buffers, kept, metadata, signatures, *_ = flat.read(_MODEL, flat.root(b"TFL3"))
        flat.text(about)
        self._buffers = [self._buffer(*table) for table in flat.tables(_BUFFER, buffers)]
        self._codes = [self._code(*table) for table in flat.tables(_CODE, codes)]
        self._check_metadata(kept, metadata)
        graph, signature = list(flat.tables(_GRAPH, graphs)), list(flat.tables(_SIGNATURE, signatures))
        if len(graph) != 1 or len(signature) != 1:
            raise Unsound(f"it has {len(graph)} graphs and {len(signature)} signatures, not one")
        tensors, takes, gives, operators, name, *_ = graph[0]
        flat.text(name)
        self.tensors = [self._tensor(table) for table in flat.tables(_TENSOR, tensors)]
        inputs, outputs = flat.ints(takes), flat.ints(gives)
        live = self._run(operators, inputs, outputs)
        takes, gives, key, _, index, *_ = signature[0]
        if index != 0:
            raise Unsound("its signature is of a graph that it lacks")
        return Verified(_decoded(flat.text(key)), self._named(takes, inputs), self._named(gives, outputs), live)

    def _check_metadata(self, kept: int, metadata: int) -> None:
        flat = self.flat
        if not all(0 <= index < len(self._buffers) for index in flat.ints(kept)):
            raise Unsound("its metadata is in a buffer that it lacks")
        for name, buffer, *_ in flat.tables(_METADATA_ENTRY, metadata):
            if flat.text(name) not in _METADATA or buffer >= len(self._buffers):
                raise Unsound("it has metadata that the exporter does not write")

    def _buffer(self, data: int, offset: int, size: int, *_: Any) -> tuple[int, int]:
        """Start and length of a buffer's bytes, inside the flatbuffer or behind it; (0, 0) without any."""
        start, length = self.flat.vector(data, 1)
        if offset or size:
            if length or offset < 2 or offset + size > self.flat.end:
                raise Unsound("weights lie outside it")
            start, length = offset, size
        if length and start % 4:
            raise Unsound("weights are not aligned")
        return (start, length) if length else (0, 0)

    def _code(self, old: int, custom: int, version: int, new: int, *_: Any) -> str:
        """An operation's name. Native code takes the larger of the old field of the code and the new."""
        code = max(old, new)
        if self.flat.text(custom) or code not in NAMES:
            raise Unsound(f"it has an operation, number {code}, that the exporter does not write")
        return NAMES[code]

    def _tensor(self, table: list[Any]) -> Tensor:
        flat = self.flat
        at, kind, buffer, name, quantization, variable, _, fixed, _ = table
        shape = flat.ints(at)
        flat.text(name)
        if kind not in TYPES:
            raise Unsound(f"a tensor is of type number {kind}, which the exporter does not write")
        elements = math.prod(shape)
        if len(shape) > _MAX_RANK or elements > _MAX_ELEMENTS or (shape and min(shape) < 1):
            raise Unsound(f"a tensor has the shape {list(shape[:8])}")
        if variable:
            raise Unsound("a tensor is variable")
        if fixed and (signature := flat.ints(fixed)) and signature != shape:
            raise Unsound(f"a tensor of shape {list(shape)} is of a size that is not fixed")
        if buffer >= len(self._buffers):
            raise Unsound("a tensor is in a buffer that it lacks")
        start, length = self._buffers[buffer]
        bits = elements * BITS[kind]
        if length and (buffer == 0 or length != (bits + 7) // 8):
            raise Unsound(f"a constant of shape {list(shape)} has {length:,} bytes, not {(bits + 7) // 8:,}")
        small = length and kind == 2 and elements <= _SMALL
        values = unpack_from(f"<{elements}i", flat.data, start) if small else None
        scales = self._quantization(*flat.read(_QUANTIZATION, quantization)) if quantization else None
        return Tensor(shape, TYPES[kind], bits // 8, length > 0, values, scales)

    def _quantization(
        self, low: int, high: int, scale: int, zero: int, details: int, _: Any, axis: int, *__: Any
    ) -> Quantization | None:
        flat = self.flat
        for seen in (low, high):  # the range that calibration saw
            flat.vector(seen, 4)
        scales, (at, points) = flat.vector(scale, 4)[1], flat.vector(zero, 8)
        if details or points != scales:
            raise Unsound("a tensor's quantisation is of a kind that the exporter does not write")
        if any(flat.data[at : at + 8 * points]):
            raise Unsound("a tensor's zero points are not zero")
        return Quantization(scales, axis) if scales else None

    def _named(self, entries: int, of_graph: tuple[int, ...]) -> Named:
        named = {}
        for name, index, *_ in self.flat.tables(_TENSOR_MAP, entries):
            if index not in of_graph:
                raise Unsound("its signature names a tensor that is neither input nor output")
            tensor = self.tensors[index]
            named[_decoded(self.flat.text(name))] = tensor.type, tensor.shape
        if len(named) != len(of_graph):
            raise Unsound("its signature does not name every input and output")
        return named

    def _run(self, operators: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> int:
        """Goes through the operations in order; returns the most bytes of activations that are alive at once."""
        tensors, count = self.tensors, len(self.tensors)
        made = {index for index, tensor in enumerate(tensors) if tensor.constant}
        if len(set(inputs)) != len(inputs) or any(not 0 <= index < count or index in made for index in inputs):
            raise Unsound("its graph has inputs that are none")
        made.update(inputs)
        steps = []
        for position, table in enumerate(self.flat.tables(_OPERATOR, operators)):
            operation, takes, gives = self._operation(table)
            name = operation.name
            for index in takes:
                if index not in made and index != -1:
                    raise Unsound(f"operation {position} ({name}) reads a tensor that nothing has made")
            operation.inputs = [tensors[index] if index >= 0 else None for index in takes]
            try:
                results = RULES[name](operation)
            except Unsound as error:
                raise Unsound(f"operation {position} ({name}): {error}") from None
            if len(results) != len(gives):
                raise Unsound(f"operation {position} ({name}) has {len(gives)} outputs, not {len(results)}")
            for index, (kind, shape) in zip(gives, results, strict=True):
                if not 0 <= index < count or index in made:
                    raise Unsound(f"operation {position} ({name}) writes a tensor that is not its own")
                if tensors[index].shape != shape or tensors[index].type != kind:
                    declared = f"{tensors[index].type} {list(tensors[index].shape)}"
                    raise Unsound(f"operation {position} ({name}) makes {kind} {list(shape)}, declared is {declared}")
                made.add(index)
            steps.append((takes, gives))
        own = made - set(inputs)
        if not outputs or any(index not in own or tensors[index].constant for index in outputs):
            raise Unsound("its graph has outputs that nothing makes")
        return self._live(steps, inputs, outputs)

    def _operation(self, table: list[Any]) -> tuple[Operation, tuple[int, ...], tuple[int, ...]]:
        flat = self.flat
        code, takes, gives, kind, options, custom, _, mutating, between, *large, more, _, _ = table
        if code >= len(self._codes):
            raise Unsound("an operation is of a code that it lacks")
        name = self._codes[code]
        if any(large) or more or any(at and flat.vector(at, 1)[1] for at in (custom, mutating, between)):
            raise Unsound(f"{name} has settings that the exporter does not write")
        wanted, layout, keys = SETTINGS[name]
        if (options == 0) != (kind == 0) or kind not in (0, wanted):
            raise Unsound(f"{name} has settings of another operation")
        values = dict(zip(keys, flat.read(layout, options) if options else layout.defaults, strict=False))
        if "new_shape" in values:
            flat.ints(values["new_shape"])
        return Operation(name, values), flat.ints(takes), flat.ints(gives)

    def _live(
        self, steps: list[tuple[tuple[int, ...], tuple[int, ...]]], inputs: tuple[int, ...], outputs: tuple[int, ...]
    ) -> int:
        size = [0 if tensor.constant else tensor.bytes for tensor in self.tensors]
        last = {index: position for position, (takes, _) in enumerate(steps) for index in takes}
        last.update((index, len(steps)) for index in outputs)
        now = most = sum(size[index] for index in inputs)
        for position, (takes, gives) in enumerate(steps):
            now += sum(size[index] for index in gives)
            most = max(most, now)
            now -= sum(size[index] for index in set(takes) if index >= 0 and last[index] == position)
            now -= sum(size[index] for index in gives if index not in last)
        return most


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise Unsound("a name is not UTF-8") from None
