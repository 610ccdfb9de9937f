"""An ONNX file's weights in smaller forms, in operations of the standard alone: every runtime computes in float32.

`float16`: stored so, with a Cast. `int8`: symmetric, a scale for each output channel, with a DequantizeLinear; of an
embedding table, for each row, and only the rows that are looked up are unpacked. Runtimes unpack the rest once, at
load. docs/runtimes.md has what other ways to 8 bits keep.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from pocketfusion.artefact import atomic_file
from pocketfusion.mobile.flatbuffer import short_path
from pocketfusion.mobile.onnx.graph_export import GRAPH
from pocketfusion.mobile.quantization.packing import round_weights
from pocketfusion.mobile.quantization.weight_forms import KEPT, MIN_WEIGHT_SQNR, rounding_sqnr
from pocketfusion.runtime.manifest import ONNX_DATA

Form = Literal["float32", "float16", "int8"]
#: Weights of fewer elements stay as they are.
SMALLEST = 2048
#: Bytes of weights from which they are in a file of their own: a protobuf ends at 2 GB.
APART_FROM = 1_900_000_000
_BYTES = {"float32": 4, "float16": 2, "int8": 1}
_ALIGNED = 64  #: start of a weight in that file, for mapping


@dataclass(frozen=True)
class _Weight:
    """A constant that an operation multiplies by or looks up: its name, the axis of its channels or rows."""

    name: str
    axis: int
    table: bool


def store(source: Path, target: Path, form: Form) -> dict[str, Form]:
    """Writes the exact network in the folder `source` as the file `target` with its weights in `form`, atomically;
    returns each weight's form.

    Time embedding, first and last convolution stay float16 in `int8`, and so do weights with outliers. More than a
    protobuf holds goes to `target`'s name with `_data` behind.
    """
    model = onnx.load(str(source / GRAPH), load_external_data=False)
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    weights = {weight.name: weight for weight in _weights(graph)} if form != "float32" else {}
    values_in_all = sum(int(np.prod(one.dims)) for one in constants.values())
    chosen: dict[str, Form] = {}
    unpack: list[Any] = []
    with _Constants(target, apart=_BYTES[form] * values_in_all > APART_FROM) as made:
        for name, constant in constants.items():
            values = _read(constant, source)
            if name not in weights:
                made.add(name, values)
                continue
            weight = weights[name]
            own = chosen[name] = _form(weight, values, form)
            if own == "float16":
                made.add(f"{name}.{own}", np.clip(values, -65504, 65504).astype(np.float16))
            else:
                integers, scale = round_weights(values, 8, weight.axis)
                shape = [-1 if i == weight.axis else 1 for i in range(values.ndim)] if weight.table else [-1]
                made.add(f"{name}.{own}", integers)
                made.add(f"{name}.scale", scale.reshape(shape))
            if weight.table:
                _look_up(graph, name, own)
            elif own == "float16":
                unpack.append(helper.make_node("Cast", [f"{name}.{own}"], [name], to=TensorProto.FLOAT))
            else:
                packed = [f"{name}.{own}", f"{name}.scale"]
                unpack.append(helper.make_node("DequantizeLinear", packed, [name], axis=weight.axis))
        nodes = [*unpack, *graph.node]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(nodes)
        graph.initializer.extend(made.tensors)
    with atomic_file(target) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))
    return chosen


def _weights(graph: Any) -> Iterator[_Weight]:
    """The float32 constants that forms are for."""
    users: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for node in graph.node:
        for place, name in enumerate(node.input):
            users[name].append((node, place))
    for constant in graph.initializer:
        dims = list(constant.dims)
        if constant.data_type != TensorProto.FLOAT or len(dims) < 2 or np.prod(dims) <= SMALLEST:
            continue
        found = {_axis(node, place, len(dims)) for node, place in users[constant.name]}
        if len(found) == 1 and (axis := found.pop()) is not None:
            yield _Weight(constant.name, axis, users[constant.name][0][0].op_type == "Gather")


def _axis(node: Any, place: int, rank: int) -> int | None:
    """The axis of a weight's output channels or rows; None where the operation does not take it as its weight."""
    said = {one.name: one.i for one in node.attribute}
    if node.op_type == "Conv" and place == 1:
        return 0
    if node.op_type == "MatMul" and place == 1 and rank == 2:
        return 1
    if node.op_type == "Gemm" and place == 1:
        return 0 if said.get("transB") else 1
    if node.op_type == "Gather" and place == 0 and said.get("axis", 0) == 0:
        return 0
    return None


def _form(weight: _Weight, values: np.ndarray, form: Form) -> Form:
    if form != "int8" or weight.table:
        return form
    kept = KEPT.fullmatch(short_path(weight.name.removesuffix(".weight")))
    return "float16" if kept or rounding_sqnr(values, weight.axis) < MIN_WEIGHT_SQNR else form


def _look_up(graph: Any, name: str, form: Form) -> None:
    """Every look-up in the table `name` takes the stored rows, and unpacks those alone."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        graph.node.append(node)
        if node.op_type != "Gather" or node.input[0] != name:
            continue
        at, rows, result = node.input[1], f"{node.output[0]}.{form}", node.output[0]
        gather = graph.node[-1]
        gather.input[0], gather.output[0] = f"{name}.{form}", rows
        if form == "float16":
            graph.node.append(helper.make_node("Cast", [rows], [result], to=TensorProto.FLOAT))
            continue
        graph.node.append(helper.make_node("Cast", [rows], [f"{rows}.float"], to=TensorProto.FLOAT))
        graph.node.append(helper.make_node("Gather", [f"{name}.scale", at], [f"{rows}.scale"], axis=0))
        graph.node.append(helper.make_node("Mul", [f"{rows}.float", f"{rows}.scale"], [result]))


def _read(constant: TensorProto, folder: Path) -> np.ndarray:
    """Its values, mapped where they lie in a file."""
    said = {one.key: one.value for one in constant.external_data}
    if not said:
        return onnx.numpy_helper.to_array(constant)
    kind = helper.tensor_dtype_to_np_dtype(constant.data_type)
    return np.memmap(folder / said["location"], kind, "r", int(said.get("offset", 0)), tuple(constant.dims))


class _Constants:
    """A file's new constants, in the graph or `apart`, in the file behind it."""

    def __init__(self, target: Path, apart: bool) -> None:
        self.tensors: list[TensorProto] = []
        self._data = target.with_name(target.name + ONNX_DATA) if apart else None
        self._stack = ExitStack()

    def __enter__(self) -> _Constants:
        if self._data is not None:
            self._file = self._stack.enter_context(self._stack.enter_context(atomic_file(self._data)).open("wb"))
        return self

    def __exit__(self, *failure: Any) -> bool | None:
        return self._stack.__exit__(*failure)

    def add(self, name: str, values: np.ndarray) -> None:
        """Stores one."""
        if self._data is None or values.size <= SMALLEST:
            self.tensors.append(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))
            return
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = TensorProto(name=name, dims=values.shape, data_type=kind, data_location=TensorProto.EXTERNAL)
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNED))
        for key, value in (("location", self._data.name), ("offset", self._file.tell()), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._file.write(np.ascontiguousarray(values).tobytes())
        self.tensors.append(tensor)
