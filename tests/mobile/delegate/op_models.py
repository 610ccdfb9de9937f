"""Builds small `.tflite` models by hand, operation by operation, from the flatbuffer schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from pocketfusion.mobile import flatbuffer

_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int8": schema.TensorType.INT8,
    "int4": schema.TensorType.INT4,
    "uint8": schema.TensorType.UINT8,
    "int32": schema.TensorType.INT32,
    "int64": schema.TensorType.INT64,
    "bool": schema.TensorType.BOOL,
}


class ModelBuilder:
    """Tensors by name, operations in order; `build` gives the file's bytes."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, b"test"
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators, self.graph.name = [], [], b"main"
        self.names: dict[str, int] = {}

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...] = (),
        dtype: str = "float32",
        values: Any = None,
        scales: Any = None,
        axis: int = 0,
        signature: tuple[int, ...] | None = None,
    ) -> str:
        """A tensor; with `values` a constant (int4 as int8 values), with `scales` a quantised one."""
        tensor = schema.TensorT()
        tensor.name, tensor.buffer = name.encode(), 0
        if values is not None:
            values = np.asarray(values)
            shape = values.shape
            if dtype == "int4":
                flat = np.append(values.reshape(-1), [0] * (values.size % 2)).astype(np.uint8) & 15
                data = flat[::2] | (flat[1::2] << 4)
            else:
                data = np.ascontiguousarray(values.astype(dtype))
            buffer = schema.BufferT()
            buffer.data = data.view(np.uint8).reshape(-1) if data.ndim else np.frombuffer(data.tobytes(), np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        tensor.shape, tensor.type = list(shape), _TYPES[dtype]
        if signature is not None:
            tensor.shapeSignature = list(signature)
        if scales is not None:
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = [float(s) for s in np.atleast_1d(scales)]
            tensor.quantization.zeroPoint = [0] * len(tensor.quantization.scale)
            tensor.quantization.quantizedDimension = axis
        self.names[name] = len(self.graph.tensors)
        self.graph.tensors.append(tensor)
        return name

    def operation(
        self,
        kind: str,
        inputs: list[str | None],
        outputs: list[str],
        version: int = 1,
        custom: str = "",
        **options: Any,
    ) -> None:
        """An operation; `options` are the schema's, their class found by the operation's name."""
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), version
        code.customCode = custom.encode() if custom else None
        op = schema.OperatorT()
        op.opcodeIndex = len(self.model.operatorCodes)
        self.model.operatorCodes.append(code)
        op.inputs = [-1 if name is None else self.names[name] for name in inputs]
        op.outputs = [self.names[name] for name in outputs]
        name = _OPTIONS.get(kind, "".join(part.capitalize() for part in kind.split("_")) + "Options")
        if hasattr(schema, name + "T"):
            op.builtinOptions = getattr(schema, name + "T")()
            op.builtinOptionsType = getattr(schema.BuiltinOptions, name)
            for key, value in options.items():
                assert hasattr(op.builtinOptions, key), f"{name} has no {key}"
                setattr(op.builtinOptions, key, value)
        else:
            assert not options, f"no options called {name}"
        self.graph.operators.append(op)

    def build(self, inputs: list[str], outputs: list[str], path: Path) -> None:
        """Writes the model to `path`, with one signature whose names are the tensors'."""
        self.graph.inputs = [self.names[name] for name in inputs]
        self.graph.outputs = [self.names[name] for name in outputs]
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
        signature.inputs, signature.outputs = [], []
        for names, entries in ((inputs, signature.inputs), (outputs, signature.outputs)):
            for name in names:
                entry = schema.TensorMapT()
                entry.name, entry.tensorIndex = name.encode(), self.names[name]
                entries.append(entry)
        self.model.subgraphs, self.model.signatureDefs = [self.graph], [signature]
        flatbuffer.write(self.model, path)


_OPTIONS = {
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "MAX_POOL_2D": "Pool2DOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "MEAN": "ReducerOptions",
    "SUM": "ReducerOptions",
    "REDUCE_MAX": "ReducerOptions",
    "REDUCE_MIN": "ReducerOptions",
    "REDUCE_PROD": "ReducerOptions",
    "CONCATENATION": "ConcatenationOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "PADV2": "PadV2Options",
    "TOPK_V2": "TopKV2Options",
    "SELECT_V2": "SelectV2Options",
    "FULLY_CONNECTED": "FullyConnectedOptions",
}
