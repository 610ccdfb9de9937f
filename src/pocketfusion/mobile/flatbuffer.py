"""Reading and writing `.tflite` files as flatbuffers of any size, with tensors named after the modules they come from.

A flatbuffer ends at 2 GB. Beyond that LiteRT keeps weights behind it, by offset and size ("external buffers"). Both
forms are read through a memory map and written without a second copy of the weights, so a network of several
gigabytes can be packed anew in little memory.
"""

from __future__ import annotations

import importlib
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

if TYPE_CHECKING:
    from torch import nn

_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16
#: Above this many bytes of weights they go behind the flatbuffer, whose offsets end at 2^31.
MAX_INLINE = 2_000_000_000
_NAMES = {value: key for key, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
#: The operations whose second input is a constant weight; that of the embedding comes second too.
WEIGHT_OPERATIONS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "EMBEDDING_LOOKUP")


class _AlignedBuffer(schema.BufferT):
    """The schema's `force_align: 16` of weights, which flatbuffers' generated Python does not honour."""

    def Pack(self, builder: Any) -> Any:
        vector = None
        if self.data is not None and len(self.data):
            data = np.ascontiguousarray(self.data).view(np.uint8)
            builder.StartVector(1, len(data), _ALIGNMENT)
            builder.head = builder.head - len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = data.data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        if self.offset:
            schema.BufferAddOffset(builder, self.offset)
            schema.BufferAddSize(builder, self.size)
        return schema.BufferEnd(builder)


@dataclass(frozen=True)
class Weight:
    """One operation's constant float32 weight: the operation, the module's path, the weight tensor's index, values."""

    operation: str
    module: str
    tensor: int
    values: np.ndarray


def read(path: Path) -> Any:
    """The file as the schema's `ModelT`; the buffers' `data` are views of the mapped file, wherever it keeps them."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    model = schema.ModelT.InitFromPackedBuf(mapped, 0)
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.data = np.frombuffer(mapped, np.uint8, count=buffer.size, offset=buffer.offset)
        buffer.offset = buffer.size = 0
    return model


def write(model: Any, path: Path) -> None:
    """Writes a `ModelT`, its weights inside the flatbuffer where they fit (`MAX_INLINE`), else behind it."""
    sizes = [0 if buffer.data is None else len(buffer.data) for buffer in model.buffers]
    for buffer in model.buffers:
        buffer.__class__ = _AlignedBuffer
    with path.open("wb") as file:
        if sum(sizes) <= MAX_INLINE:
            file.write(_packed(model, sum(sizes) + _ALIGNMENT * len(sizes)))
            return
        weights = [buffer.data for buffer in model.buffers]
        for buffer, size in zip(model.buffers, sizes, strict=True):
            if size:
                buffer.data, buffer.offset, buffer.size = None, 2, size
        end = len(_packed(model, 0))  # the numbers' values do not change the length
        for buffer in model.buffers:
            if buffer.offset:
                buffer.offset = end = -(-end // _ALIGNMENT) * _ALIGNMENT
                end += buffer.size
        file.write(_packed(model, 0))
        for buffer, data in zip(model.buffers, weights, strict=True):
            if buffer.offset:
                file.seek(buffer.offset)
                file.write(np.ascontiguousarray(data).data)
                buffer.data, buffer.offset, buffer.size = data, 0, 0


def _packed(model: Any, weights: int) -> memoryview:
    # Room for all of it at once: a builder that grows copies what it has into twice the memory.
    builder = flatbuffers.Builder(weights + (1 << 23))
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return memoryview(builder.Bytes)[builder.Head() :]


#: litert-torch's name of a module: its path, and the shape of the weight that it holds itself.
Chains = Mapping[str, tuple[str, "tuple[int, ...] | None"]]


def module_chains(module: nn.Module) -> Chains:
    """litert-torch's names of `module`'s submodules: the classes and attributes of those that are called.

    A wrapper's own attribute is left out: paths are diffusers' (`down_blocks.0.attentions.0`).
    """
    containers = importlib.import_module("torch.nn")  # torch is not needed to read files
    root = f"{type(module).__module__}.{type(module).__qualname__}"
    chains: dict[str, tuple[str, tuple[int, ...] | None]] = {root: ("", None)}
    for path, child in module.named_modules():
        parts, parent, links = path.split(".") if path else [], module, [root]
        for part in parts:
            parent = parent.get_submodule(part)
            if not isinstance(parent, (containers.ModuleList, containers.ModuleDict)):
                links.append(f"{type(parent).__module__}.{type(parent).__qualname__}_{part}")
        if parts and not isinstance(child, (containers.ModuleList, containers.ModuleDict)):
            shapes = [tuple(parameter.shape) for parameter in child.parameters(recurse=False) if parameter.ndim > 1]
            chains["/".join(links)] = short_path(path), shapes[0] if shapes else None
    return chains


def short_path(path: str) -> str:
    """A submodule's path in a wrapper without the wrapper's own attribute."""
    first, _, rest = path.partition(".")
    return rest if first in ("unet", "text_encoder") and rest else path


def rename(model: Any, chains: Chains) -> None:
    """Names every tensor `PATH#N`: the module that it comes from (empty if none), its index.

    litert-torch's own names are whole chains of classes, over a megabyte for a UNet, and a list of them where several
    operations were fused or merged. Of an operation with a weight, the layer is the last in the list whose weight has
    that size; a weight that several share (equal placeholders) keeps no name. Signatures' names stay.
    """
    for graph in model.subgraphs:
        named = [_found(_text(tensor.name or b""), chains) for tensor in graph.tensors]
        paths = [found[0][0] if found else "" for found in named]
        sized = {path: _size(shape) for path, shape in chains.values() if shape is not None}
        left = []
        for operator in graph.operators:
            if operation_name(model, operator) not in WEIGHT_OPERATIONS:
                continue
            weight, output = int(operator.inputs[1]), int(operator.outputs[0])
            size = _size(graph.tensors[weight].shape)
            candidates = [path for path, _ in (*reversed(named[output]), *reversed(named[weight]))]
            layer = next((path for path in candidates if sized.get(path) == size), None)
            if layer is None:
                left.append((weight, output, size))
            else:
                del sized[layer]
                paths[weight] = paths[output] = layer
        for weight, output, size in left:  # named after its parent or a neighbour: the one layer there that is missing
            parents = [path for path, _ in (*named[output], *named[weight])]
            parents += [path.rpartition(".")[0] for path in parents]
            for parent in parents:
                missing = [path for path, one in sized.items() if one == size and path.startswith(f"{parent}.")]
                if len(missing) == 1:
                    del sized[missing[0]]
                    paths[weight] = paths[output] = missing[0]
                    break
        for index, tensor in enumerate(graph.tensors):
            tensor.name = f"{paths[index]}#{index}"


def _found(name: str, chains: Chains) -> list[tuple[str, tuple[int, ...] | None]]:
    """The modules in a tensor's name."""
    found = []
    for chain in name.split(";"):
        while chain and chain not in chains:
            chain = chain.rpartition("/")[0]
        if chain and chains[chain][0]:
            found.append(chains[chain])
    return found


def _size(shape: Any) -> list[int]:
    """A weight's extents in no order: files and modules lay them out differently."""
    return sorted(int(extent) for extent in shape if extent != 1)


def drop_unused(model: Any) -> None:
    """Empties the buffers that no tensor and no metadata refers to any more."""
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    used |= {entry.buffer for entry in model.metadata or []}
    for index, buffer in enumerate(model.buffers):
        if index not in used:
            buffer.data = None


def module_of(name: str) -> str:
    """The module's path in a tensor's name; empty where there is none, as in bundles of before this naming."""
    return name.rpartition("#")[0]


def operation_name(model: Any, operator: Any) -> str:
    """The schema's name of an operator, such as CONV_2D."""
    code = model.operatorCodes[operator.opcodeIndex]
    return _NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]


def operation_code(model: Any, kind: int) -> int:
    """The index of the built-in operator `kind` among the model's operation codes, added where it is missing."""
    for index, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == kind:
            return index
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = kind
    code.version = 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def has_data(model: Any, tensor: Any) -> bool:
    """If the tensor is a constant."""
    data = model.buffers[tensor.buffer].data
    return data is not None and len(data) > 0


def operations(path: Path) -> list[Counter[str]]:
    """How often each operation occurs, per subgraph (one per signature)."""
    model = read(path)
    return [Counter(operation_name(model, operator) for operator in graph.operators) for graph in model.subgraphs]


def weights(model: Any) -> Iterator[Weight]:
    """The constant float32 weights of a `ModelT`'s subgraphs, each once, output channels (or rows) first.

    A depthwise weight has its channels last. A layer whose module is not known is called after its output.
    """
    for graph in model.subgraphs:
        seen = set()
        for operator in graph.operators:
            name = operation_name(model, operator)
            if name not in WEIGHT_OPERATIONS or (index := operator.inputs[1]) in seen:
                continue
            tensor = graph.tensors[index]
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data) and tensor.type == schema.TensorType.FLOAT32:
                seen.add(index)
                values = np.asarray(data).view(np.float32).reshape(tensor.shape)
                names = [_text(graph.tensors[i].name) for i in (index, operator.outputs[0])]
                module = next(filter(None, map(module_of, names)), names[0])
                yield Weight(name, module, int(index), values)


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
