"""Cuts operations out of a `.tflite` file as a model of their own, and makes quantised weights float."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from pocketfusion.mobile import flatbuffer
from pocketfusion.mobile.delegate.graph import File, Graph, Operation, Tensor

SIGNATURE = "serving_default"


def closure(graph: Graph, chosen: Collection[int]) -> list[Operation]:
    """The operations of these indices and those that make their weights of constants (DEQUANTIZE), in order."""
    wanted, stack = set(chosen), [graph.operations[i] for i in chosen]
    while stack:
        for tensor in stack.pop().given:
            if tensor.index in graph.folded and (producer := graph.producers[tensor.index]).index not in wanted:
                wanted.add(producer.index)
                stack.append(producer)
    return [graph.operations[i] for i in sorted(wanted)]


def boundary(graph: Graph, operations: Collection[Operation]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors that the operations read from the rest of the graph, and tensors that the rest (or nobody) reads.

    Of weights that are computed from constants only those are outputs that the graph itself gives.
    """
    inside = {operation.index for operation in operations}
    made = {tensor.index for operation in operations for tensor in operation.outputs}
    ends = {tensor.index for tensor in graph.outputs.values()}
    read = {t.index: t for operation in operations for t in operation.given if not t.constant and t.index not in made}
    wrote = []
    for tensor in (tensor for operation in operations for tensor in operation.outputs):
        readers = {reader.index for reader in graph.consumers.get(tensor.index, [])}
        if tensor.index in ends or not readers or (readers - inside and tensor.index not in graph.folded):
            wrote.append(tensor)
    return list(read.values()), wrote


def key(tensor: Tensor) -> str:
    """What `extract` calls a tensor at the boundary."""
    return f"t{tensor.index}"


def extract(file: File, graph: Graph, chosen: Collection[int], path: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Writes the operations of these indices to `path` as a model of one signature; returns its inputs and outputs,
    whose names in the signature are `key`'s."""
    operations = closure(graph, chosen)
    reads, writes = boundary(graph, operations)
    source = file.model.subgraphs[graph.index]
    model, part = _empty(file.model.version)
    placed: dict[int, int] = {-1: -1}
    codes: dict[int, int] = {}

    def place(index: int) -> int:
        if index not in placed:
            tensor = copy.copy(source.tensors[index])
            buffer = file.model.buffers[tensor.buffer]
            tensor.name, tensor.buffer = f"t{index}", 0
            if buffer.data is not None and len(buffer.data):
                tensor.buffer = _buffer(model, buffer.data)
            placed[index] = len(part.tensors)
            part.tensors.append(tensor)
        return placed[index]

    for operation in operations:
        op = copy.copy(source.operators[operation.index])
        if op.opcodeIndex not in codes:
            codes[op.opcodeIndex] = len(model.operatorCodes)
            model.operatorCodes.append(file.model.operatorCodes[op.opcodeIndex])
        op.opcodeIndex = codes[op.opcodeIndex]
        op.inputs = [place(int(i)) for i in (() if op.inputs is None else op.inputs)]
        op.outputs = [place(int(i)) for i in op.outputs]
        part.operators.append(op)
    part.inputs, part.outputs = ([place(t.index) for t in tensors] for tensors in (reads, writes))
    _sign(model, [key(t) for t in reads], [key(t) for t in writes])
    flatbuffer.write(model, path)
    return reads, writes


def float_weights(file: File, path: Path) -> bool:
    """Writes the file to `path` with its integer weights beside float activations made float32, as the GPU delegate
    computes with them (CPUs round the activations to 8 bits instead); False, and nothing written, if it has none."""
    model = copy.copy(file.model)
    model.buffers, model.subgraphs = list(model.buffers), [copy.copy(graph) for graph in model.subgraphs]
    changed = False
    for graph in file.graphs:
        part = model.subgraphs[graph.index]
        part.tensors = list(part.tensors)
        for operation in graph.operations:
            if operation.outputs[0].dtype != "float32" or operation.kind == "DEQUANTIZE":
                continue
            for tensor in operation.given:
                if tensor.values is None or tensor.dtype not in ("int8", "int4") or not tensor.scales:
                    continue
                source = part.tensors[tensor.index]
                if source.type == schema.TensorType.FLOAT32:
                    continue  # done: an earlier operation shares it
                quantised = source.quantization
                shape = [1] * len(tensor.shape)
                if tensor.scales > 1:
                    shape[quantised.quantizedDimension] = tensor.scales
                values = tensor.values() * np.asarray(quantised.scale, np.float32).reshape(shape)
                replaced = copy.copy(source)
                replaced.quantization, replaced.type = None, schema.TensorType.FLOAT32
                replaced.buffer = _buffer(model, np.ascontiguousarray(values, np.float32).view(np.uint8).reshape(-1))
                part.tensors[tensor.index] = replaced
                changed = True
    if changed:
        flatbuffer.write(model, path)
    return changed


def one_operation(kind: str, shape: tuple[int, ...], path: Path) -> None:
    """Writes a model of one operation without settings from `x` to `y`, both float32 of this shape."""
    model, part = _empty(3)
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, kind)
    code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 1
    model.operatorCodes.append(code)
    for name in ("x", "y"):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), schema.TensorType.FLOAT32, 0
        part.tensors.append(tensor)
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    part.operators.append(operator)
    part.inputs, part.outputs = [0], [1]
    _sign(model, ["x"], ["y"])
    flatbuffer.write(model, path)


def _empty(version: int) -> tuple[Any, Any]:
    model, part = schema.ModelT(), schema.SubGraphT()
    model.version, model.description = version, "a part"
    model.buffers, model.operatorCodes, model.subgraphs = [schema.BufferT()], [], [part]
    part.tensors, part.operators, part.name = [], [], "main"
    return model, part


def _buffer(model: Any, data: np.ndarray) -> int:
    buffer = schema.BufferT()
    buffer.data = data
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _sign(model: Any, inputs: list[str], outputs: list[str]) -> None:
    """Adds the one signature, of these names in the order of the graph's inputs and outputs."""
    part, signature = model.subgraphs[0], schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = SIGNATURE, 0
    signature.inputs, signature.outputs = [], []
    for entries, names, tensors in (
        (signature.inputs, inputs, part.inputs),
        (signature.outputs, outputs, part.outputs),
    ):
        for name, tensor in zip(names, tensors, strict=True):
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name, tensor
            entries.append(entry)
    model.signatureDefs = [signature]
