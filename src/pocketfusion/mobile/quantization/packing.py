"""Packed quantisation: the weights of a float32 `.tflite` file rewritten in smaller forms, layer by layer.

Done on the flatbuffer itself because the stock quantizer returns empty tensors for files over 2 GB, which a
full-size UNet is before it is packed. On smaller files both give the same bytes (tests/mobile/test_packed_weights.py).
What the forms mean to each runtime is told in docs/quantization.md; `sensitivity` computes the same in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from pocketfusion.artefact import atomic_file
from pocketfusion.mobile.flatbuffer import Weight, drop_unused, operation_code, read, weights, write

#: How a layer's weight is stored and computed with. `float16` and `int8` are unpacked to float32 when the file is
#: loaded; the dynamic forms go straight into the operation: CPUs round activations to 8 bits as they come and compute
#: in integers, the GPU delegate unpacks the weights and computes in floating point.
Form = Literal["float32", "float16", "int8", "int8-dynamic", "int4-dynamic"]
FORMS: tuple[str, ...] = get_args(Form)
_BITS = {"int8": 8, "int8-dynamic": 8, "int4-dynamic": 4}
Rounded = tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]


def channel_axis(operation: str) -> int:
    """The axis of an operation's weight that has a scale of its own per index: output channels or embedding rows."""
    return 3 if operation == "DEPTHWISE_CONV_2D" else 0


def round_weights(values: np.ndarray, bits: int, axis: int = 0) -> Rounded:
    """Symmetric integers of `values` and their float32 scales, one per index of `axis`: largest value = 2^(bits-1)-1.

    A channel of zeros has scale 1.
    """
    limit = 2 ** (bits - 1) - 1
    others = tuple(i for i in range(values.ndim) if i != axis)
    scale = (np.abs(values).max(others, keepdims=True) / np.float32(limit)).astype(np.float32)
    scale[scale == 0] = 1
    return np.clip(np.rint(values / scale), -limit, limit).astype(np.int8), scale.reshape(-1)


def storable(form: Form, operation: str) -> Form:
    """`form`, or the one that takes its place for an operation without integer kernels of it.

    An embedding table is looked up in int8 as it is, which costs nothing; depthwise convolutions have no int4 form.
    """
    if operation == "EMBEDDING_LOOKUP" and form in _BITS:
        return "int8-dynamic"
    if operation == "DEPTHWISE_CONV_2D" and form == "int4-dynamic":
        return "int8-dynamic"
    return form


def pack(source: Path, target: Path, choose: Callable[[Weight], Form], *, unpacked: bool = False) -> dict[str, Form]:
    """Writes the float32 file `source` at `target` with each weight in the form that `choose` gives; atomically.

    Returns the form of each layer by its module's name. Inputs, outputs and all other tensors stay float32. With
    `unpacked` the weights are rounded but stored as float32: what a device computes that unpacks them.
    """
    model = read(source)
    chosen: dict[str, Form] = {}
    for weight in list(weights(model)):
        form = storable(choose(weight), weight.operation)
        chosen[weight.module] = form
        if form != "float32":
            (_round if unpacked else _store)(model, weight, form)
    drop_unused(model)
    with atomic_file(target) as partial:
        write(model, partial)
    return chosen


def rounded(values: np.ndarray, form: Form, axis: int = 0) -> np.ndarray:
    """`values` as `form` stores them, in float32."""
    if form == "float32":
        return values
    if form == "float16":
        return _halves(values).astype(np.float32)
    integers, scale = round_weights(values, _BITS[form], axis)
    return integers * scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])


def _halves(values: np.ndarray) -> npt.NDArray[np.float16]:
    return np.clip(values, -65504, 65504).astype(np.float16)


def _round(model: Any, weight: Weight, form: Form) -> None:
    graph = next(g for g in model.subgraphs if any(weight.tensor in o.inputs for o in g.operators))
    values = rounded(weight.values, form, channel_axis(weight.operation)).astype(np.float32)
    graph.tensors[weight.tensor].buffer = len(model.buffers)
    model.buffers.append(schema.BufferT())
    model.buffers[-1].data = values.reshape(-1).view(np.uint8)


def _store(model: Any, weight: Weight, form: Form) -> None:
    graph = next(g for g in model.subgraphs if any(weight.tensor in o.inputs for o in g.operators))
    tensor = graph.tensors[weight.tensor]
    stored = schema.TensorT()
    stored.shape, stored.name = tensor.shape, f"{weight.module}.weight#{len(graph.tensors)}"
    if form == "float16":
        stored.type = schema.TensorType.FLOAT16
        data = _halves(weight.values).reshape(-1).view(np.uint8)
    else:
        axis = channel_axis(weight.operation)
        integers, scale = round_weights(weight.values, _BITS[form], axis)
        stored.type = schema.TensorType.INT4 if form == "int4-dynamic" else schema.TensorType.INT8
        stored.quantization = schema.QuantizationParametersT()
        stored.quantization.scale, stored.quantization.zeroPoint = scale, np.zeros(len(scale), np.int64)
        stored.quantization.quantizedDimension = axis
        data = nibbles(integers) if form == "int4-dynamic" else integers.reshape(-1).view(np.uint8)
    stored.buffer = len(model.buffers)
    model.buffers.append(schema.BufferT())
    model.buffers[-1].data = data
    if form.endswith("dynamic"):
        stored.name = tensor.name
        graph.tensors[weight.tensor] = stored
        return
    tensor.buffer = 0
    operator = schema.OperatorT()
    operator.opcodeIndex = operation_code(model, schema.BuiltinOperator.DEQUANTIZE)
    operator.inputs = np.array([len(graph.tensors)], np.int32)
    operator.outputs = np.array([weight.tensor], np.int32)
    graph.tensors.append(stored)
    graph.operators.insert(0, operator)


def nibbles(integers: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Signed 4-bit integers, two to a byte, the first in the low half."""
    flat = integers.reshape(-1).view(np.uint8) & 0xF
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[::2] | (flat[1::2] << np.uint8(4))
