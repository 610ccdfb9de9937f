"""Reading and writing `.tflite` files as flatbuffers of any size, with tensors named after the modules they come from.

A flatbuffer ends at 2 GB. Beyond that LiteRT keeps weights behind it, by offset and size ("external buffers"). Both
forms are read through a memory map and written without a second copy of the weights, so a network of several
gigabytes can be packed anew in little memory.
"""

from __future__ import annotations

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


def module_chains(module: nn.Module) -> dict[str, tuple[str, bool]]:
    """litert-torch's names of `module`'s submodules (classes and attributes of those that are called): their paths,
    and whether they hold a weight of their own.

    A wrapper's own attribute is left out: paths are diffusers' (`down_blocks.0.attentions.0`).
    """
    from torch import nn  # here, so that reading files needs no torch

    root = f"{type(module).__module__}.{type(module).__qualname__}"
    chains = {root: ("", False)}
    for path, child in module.named_modules():
        parts, parent, links = path.split(".") if path else [], module, [root]
        for part in parts:
            parent = parent.get_submodule(part)
            if not isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
                links.append(f"{type(parent).__module__}.{type(parent).__qualname__}_{part}")
        if parts and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            weighted = any(parameter.ndim > 1 for parameter in child.parameters(recurse=False))
            short = ".".join(parts[1:] if parts[0] in ("unet", "text_encoder") else parts)
            chains["/".join(links)] = short, weighted
    return chains


def rename(model: Any, chains: Mapping[str, tuple[str, bool]]) -> None:
    """Names every tensor `PATH#N`: the module that it comes from (empty if none), its index.

    litert-torch's own names are whole chains of classes, over a megabyte for a UNet. An operation that several were
    fused or merged into has a list of them: its own weight layer comes last. Signatures' names stay.
    """
    for graph in model.subgraphs:
        for index, tensor in enumerate(graph.tensors):
            found = [_lookup(chain, chains) for chain in _text(tensor.name or b"").split(";")]
            known = [one for one in found if one[0]] or [("", False)]
            path = next((path for path, weighted in reversed(known) if weighted), known[0][0])
            tensor.name = f"{path}#{index}"


def _lookup(chain: str, chains: Mapping[str, tuple[str, bool]]) -> tuple[str, bool]:
    while chain and chain not in chains:
        chain = chain.rpartition("/")[0]
    return chains.get(chain, ("", False))


def module_of(name: str) -> str:
    """The module's path in a tensor's name; empty where there is none, as in bundles of before this naming."""
    return name.rpartition("#")[0]


def operation_name(model: Any, operator: Any) -> str:
    """The schema's name of an operator, such as CONV_2D."""
    code = model.operatorCodes[operator.opcodeIndex]
    return _NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]


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
                # The graph's own output is named after the signature: the weight's name tells the module then.
                names = [_text(graph.tensors[i].name) for i in (operator.outputs[0], index)]
                module = next(filter(None, map(module_of, names)), names[0])
                yield Weight(name, module, int(index), values)


def _text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name
