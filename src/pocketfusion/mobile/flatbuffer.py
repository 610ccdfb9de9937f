"""Reading and rewriting `.tflite` files as flatbuffers: short tensor names, operation counts, weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_IDENTIFIER = b"TFL3"
_ALIGNMENT = 16
_NAMES = {value: key for key, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
#: The operations whose second input is a constant weight; that of the embedding comes second too.
WEIGHT_OPERATIONS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "EMBEDDING_LOOKUP")


class _AlignedBuffer(schema.BufferT):
    """The schema's `force_align: 16` of weights, which flatbuffers' generated Python does not honour."""

    def Pack(self, builder: Any) -> Any:
        vector = None
        if self.data is not None and len(self.data):
            data = bytes(self.data)
            builder.StartVector(1, len(data), _ALIGNMENT)
            builder.head = builder.head - len(data)
            builder.Bytes[builder.head : builder.head + len(data)] = data
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        return schema.BufferEnd(builder)


@dataclass(frozen=True)
class Weight:
    """One operation's constant float32 weight: the operation, its output tensor's name, the values."""

    operation: str
    output: str
    values: np.ndarray


def read(path: Path) -> Any:
    """The file as the schema's `ModelT` object."""
    return schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)


def slim(path: Path) -> None:
    """Replaces the tensors' long names (module paths, over a megabyte for a UNet) by `s0_t12`: subgraph, tensor.

    Signatures' names are kept apart from tensors' and stay. Files whose weights lie outside the flatbuffer (beyond
    2 GB) are left as they are.
    """
    model = read(path)
    if any(buffer.offset > 1 for buffer in model.buffers):
        return
    for s, graph in enumerate(model.subgraphs):
        for t, tensor in enumerate(graph.tensors):
            tensor.name = f"s{s}_t{t}"
    for buffer in model.buffers:
        buffer.__class__ = _AlignedBuffer
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    path.write_bytes(builder.Output())


def _name(model: Any, operator: Any) -> str:
    code = model.operatorCodes[operator.opcodeIndex]
    return _NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]


def operations(path: Path) -> list[Counter[str]]:
    """How often each operation occurs, per subgraph (one per signature)."""
    model = read(path)
    return [Counter(_name(model, operator) for operator in graph.operators) for graph in model.subgraphs]


def weights(path: Path) -> Iterator[Weight]:
    """The constant float32 weights of all subgraphs, output channels (or embedding rows) first."""
    model = read(path)
    for graph in model.subgraphs:
        for operator in graph.operators:
            name = _name(model, operator)
            if name not in WEIGHT_OPERATIONS:
                continue
            tensor = graph.tensors[operator.inputs[1]]
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data) and tensor.type == schema.TensorType.FLOAT32:
                values = np.frombuffer(bytes(data), np.float32).reshape(tensor.shape)
                yield Weight(name, graph.tensors[operator.outputs[0]].name.decode(), values)
