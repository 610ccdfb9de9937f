"""A `.tflite` file as plain tensors and operations, one graph per signature: what the rules and the reports read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from pocketfusion.data.files import open_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import flatbuffer

_TYPES = {value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
#: Types of whole numbers, as the schema names them.
INTEGERS = frozenset({"int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"})


@dataclass(frozen=True)
class Tensor:
    """One tensor: its index in the graph, name, shape, type ("float32", "int8", …).

    `scales` is the number of quantisation scales: 0 for none, 1 for one per tensor, more for one per channel.
    `values` reads a constant's numbers; None for what the graph computes.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: int
    values: Callable[[], np.ndarray] | None

    @property
    def constant(self) -> bool:
        return self.values is not None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        scales = f" of {self.scales} scales" if self.scales > 1 else ""
        return f"{self.dtype}[{'×'.join(map(str, self.shape))}]{scales}{' constant' if self.constant else ''}"


@dataclass(frozen=True)
class Operation:
    """One operation: its index in the graph, name and version in the schema, tensors (None: an optional one absent).

    `options` is the schema's object of the operation's settings, or None.
    """

    index: int
    kind: str
    version: int
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    options: Any

    @property
    def module(self) -> str:
        """Path of the PyTorch module that the operation came from; empty where the file's names do not say."""
        return next((path for tensor in self.outputs if (path := _module_of(tensor.name))), "")

    @property
    def given(self) -> list[Tensor]:
        """The inputs that are there."""
        return [tensor for tensor in self.inputs if tensor is not None]

    def signature(self) -> str:
        """Equal for operations that differ in nothing the delegate looks at but their place."""
        tensors = ", ".join(_detail(tensor) for tensor in self.inputs) + " -> "
        tensors += ", ".join(_detail(tensor) for tensor in self.outputs)
        return f"{self.kind} v{self.version} {tensors} {_settings(self.options)}"


@dataclass(frozen=True)
class Graph:
    """One signature's graph; `inputs` and `outputs` are the signature's names in the order of the graph's tensors."""

    name: str
    index: int
    operations: tuple[Operation, ...]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    @cached_property
    def producers(self) -> dict[int, Operation]:
        """The operation that computes a tensor, by the tensor's index."""
        return {tensor.index: operation for operation in self.operations for tensor in operation.outputs}

    @cached_property
    def consumers(self) -> dict[int, list[Operation]]:
        """The operations that read a tensor, by the tensor's index."""
        found: dict[int, list[Operation]] = {}
        for operation in self.operations:
            for tensor in operation.given:
                found.setdefault(tensor.index, []).append(operation)
        return found

    @cached_property
    def folded(self) -> set[int]:
        """Tensors that depend on constants only, such as weights after their DEQUANTIZE."""
        found: set[int] = set()
        for operation in self.operations:
            given = operation.given
            if given and all(tensor.constant or tensor.index in found for tensor in given):
                found.update(tensor.index for tensor in operation.outputs)
        return found


@dataclass(frozen=True)
class File:
    """A `.tflite` file: its path, the schema's `ModelT` and a graph per signature."""

    path: Path
    model: Any
    graphs: tuple[Graph, ...]


def load(path: Path) -> File:
    """Reads the file at `path`; weights stay on disk until they are looked at.

    Raises PocketfusionError if it is missing, is no `.tflite`, is damaged or has custom operations, which it names.
    """
    with open_file(path) as f:  # a FIFO would be waited for
        begin = f.read(8)
    if begin[4:8] != b"TFL3":
        raise PocketfusionError(f"{path} is not a .tflite file: give a LiteRT model or a bundle's folder")
    try:
        model = flatbuffer.read(path)
        names = _signatures(model)
        custom = sorted({name for graph in model.subgraphs for op in graph.operators if (name := _custom(model, op))})
        if custom:
            raise PocketfusionError(
                f"{path} has the custom operation{'s' * (len(custom) > 1)} {', '.join(custom)}, which no GPU delegate "
                "runs: convert the model without them"
            )
        return File(path, model, tuple(_graph(model, *entry) for entry in names))
    except PocketfusionError:
        raise
    except Exception as error:  # whatever a damaged flatbuffer makes the parser do
        raise PocketfusionError(f"{path} is damaged ({type(error).__name__}): restore it or export it again") from None


def _module_of(name: str) -> str:
    """The module's path in a tensor's name, our `MODULE#N` or litert-torch's chain of classes; else empty."""
    if "#" in name:
        return flatbuffer.module_of(name)
    if ";" not in name:
        return ""
    links = name.partition(";")[0].split("/")[1:]
    return ".".join(re.sub(r"^_*[A-Za-z0-9]+_", "", link.rpartition(".")[2]) for link in links)


def _custom(model: Any, operator: Any) -> str | None:
    if flatbuffer.operation_name(model, operator) != "CUSTOM":
        return None
    return (model.operatorCodes[operator.opcodeIndex].customCode or b"without a name").decode(errors="replace")


def _signatures(model: Any) -> list[tuple[str, int, dict[int, str], dict[int, str]]]:
    """Name, subgraph and names of inputs and outputs (by tensor) of each signature; of the first graph if none."""
    if not model.signatureDefs:
        return [("main", 0, {}, {})]
    return [
        (
            s.signatureKey.decode(),
            s.subgraphIndex,
            *({t.tensorIndex: t.name.decode() for t in ts} for ts in (s.inputs, s.outputs)),
        )
        for s in model.signatureDefs
    ]


def _graph(model: Any, name: str, index: int, inputs: dict[int, str], outputs: dict[int, str]) -> Graph:
    graph = model.subgraphs[index]
    tensors = [_tensor(model, i, tensor) for i, tensor in enumerate(graph.tensors)]
    operations = []
    for i, op in enumerate(graph.operators):
        read = tuple(tensors[t] if t >= 0 else None for t in (() if op.inputs is None else op.inputs))
        wrote = tuple(tensors[t] for t in (() if op.outputs is None else op.outputs))
        version = model.operatorCodes[op.opcodeIndex].version
        options = op.builtinOptions if op.builtinOptions is not None else op.builtinOptions2
        operations.append(Operation(i, flatbuffer.operation_name(model, op), version, read, wrote, options))
    return Graph(
        name,
        index,
        tuple(operations),
        {inputs.get(t, f"input_{i}"): tensors[t] for i, t in enumerate(graph.inputs)},
        {outputs.get(t, f"output_{i}"): tensors[t] for i, t in enumerate(graph.outputs)},
    )


def _tensor(model: Any, index: int, tensor: Any) -> Tensor:
    shape = tuple(int(n) for n in (() if tensor.shape is None else tensor.shape))
    scale = tensor.quantization.scale if tensor.quantization is not None else None
    data = model.buffers[tensor.buffer].data
    values = None
    if data is not None and len(data):
        values = partial(constant_values, data, _TYPES[tensor.type], shape)
    return Tensor(
        index,
        (tensor.name or b"").decode(errors="replace"),
        shape,
        _TYPES[tensor.type],
        0 if scale is None else len(scale),
        values,
    )


def constant_values(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """A constant tensor's numbers in its own type and shape; int4 as int8."""
    if kind == "int4":
        low, high = (data << 4).astype(np.int8) >> 4, data.astype(np.int8) >> 4
        return np.stack([low, high], -1).reshape(-1)[: math.prod(shape)].reshape(shape)
    return np.ascontiguousarray(data).view(np.dtype(kind)).reshape(shape)


def _detail(tensor: Tensor | None) -> str:
    """What the delegate may look at: the form, and the numbers of small integer constants (axes, shapes, paddings)."""
    if tensor is None:
        return "none"
    small = tensor.values is not None and tensor.dtype in INTEGERS and tensor.size <= 64
    return f"{tensor}={tensor.values().tolist()}" if small and tensor.values else str(tensor)


def _settings(options: Any) -> str:
    return "" if options is None else " ".join(f"{key}={value}" for key, value in sorted(vars(options).items()))
