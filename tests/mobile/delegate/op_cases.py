"""Models of one or a few operations, by name: every kind that SD's networks use, and one for every rule.

`python tests/mobile/delegate/op_cases.py` asks the delegate about each and rewrites `verdicts.json`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from op_models import ModelBuilder

VERDICTS = Path(__file__).with_name("verdicts.json")
Shape = tuple[int, ...]
Case = Callable[[Path], None]
NHWC: Shape = (1, 8, 8, 4)
FIVE: Shape = (1, 2, 2, 2, 2)
_rng = np.random.default_rng(0)


def apply(
    kind: str,
    shapes: Sequence[Shape],
    out: Shape | Sequence[Shape],
    constants: Sequence[tuple[Any, str]] = (),
    *,
    dtype: str = "float32",
    out_dtype: str | None = None,
    version: int = 1,
    constants_first: bool = False,
    same: bool = False,
    **options: Any,
) -> Case:
    """One operation on inputs of `shapes` (with `same` one input, taken twice), then constants, with its options."""

    def build(path: Path) -> None:
        b = ModelBuilder()
        inputs = [b.tensor(f"x{i}", shape, dtype) for i, shape in enumerate(shapes)]
        fixed = [b.tensor(f"c{i}", dtype=kind, values=np.asarray(v)) for i, (v, kind) in enumerate(constants)]
        outs = [out] if not out or isinstance(out[0], int) else out
        outputs = [b.tensor(f"y{i}", shape, out_dtype or dtype) for i, shape in enumerate(outs)]  # type: ignore[arg-type]
        read = inputs * 2 if same else [*fixed, *inputs] if constants_first else [*inputs, *fixed]
        b.operation(kind, list(read), outputs, version=version, **options)
        b.build(inputs, outputs, path)

    return build


def weighted(kind: str, form: str, version: int = 3, dequantize: int | None = None, bias: bool = True) -> Case:
    """A layer with weights of `form`: float32, float16, dq8, dq8pc (DEQUANTIZE of int8, per channel), dyn8, dyn8pc,
    dq4pc, dyn4, dyn4pc; `dequantize` is that operation's version."""

    def build(path: Path) -> None:
        b = ModelBuilder()
        shape, weight, out, axis = {
            "CONV_2D": (NHWC, (6, 3, 3, 4), (1, 8, 8, 6), 0),
            "DEPTHWISE_CONV_2D": (NHWC, (1, 3, 3, 4), NHWC, 3),
            "FULLY_CONNECTED": ((6, 8), (16, 8), (6, 16), 0),
            "BATCH_MATMUL": ((2, 3, 4), (2, 4, 5), (2, 3, 5), 0),
            "ADD": ((2, 3, 4), (2, 3, 4), (2, 3, 4), 0),
            "EMBEDDING_LOOKUP": ((3,), (10, 8), (3, 8), 0),
        }[kind]
        x = b.tensor("x", shape, "int32" if kind == "EMBEDDING_LOOKUP" else "float32")
        values = np.random.default_rng(1).standard_normal(weight).astype(np.float32)
        dtype = "int4" if "4" in form else "int8"
        limit = 7 if dtype == "int4" else 127
        count = weight[axis] if form.endswith("pc") else 1
        scales = np.linspace(1, 2, count) * 3 / limit
        reach = [1] * len(weight)
        reach[axis] = count
        rounded = np.clip(np.round(values / scales.reshape(reach)), -limit, limit).astype(np.int8)
        if form == "float32":
            w = b.tensor("w", values=values)
        elif form.startswith("dyn"):
            w = b.tensor("w", dtype=dtype, values=rounded, scales=scales, axis=axis)
        else:
            if form == "float16":
                source = b.tensor("w16", dtype="float16", values=values)
            else:
                source = b.tensor("w8", dtype=dtype, values=rounded, scales=scales, axis=axis)
            w = b.tensor("w", weight)
            default = 3 if form == "float16" else 5 if form.endswith("pc") else 2
            b.operation("DEQUANTIZE", [source], [w], version=dequantize or default)
        inputs: list[str | None] = [x, w]
        if kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED") and bias:
            inputs.append(b.tensor("b", values=np.ones(out[-1], np.float32)))
        settings: dict[str, Any] = {}
        if "CONV" in kind:
            settings = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
            if kind == "DEPTHWISE_CONV_2D":
                settings["depthMultiplier"] = 1
        y = b.tensor("y", out)
        if kind == "EMBEDDING_LOOKUP":
            inputs = [x, w]
        b.operation(kind, inputs, [y], version=version if "CONV" in kind or "FULLY" in kind else 1, **settings)
        b.build([x], [y], path)

    return build


def rows(shape: tuple[int, ...], dtype: str, keep: bool = False) -> Case:
    """A linear layer [..., 8] -> [rows, 16], or [..., 16] with `keepNumDims`."""

    def build(path: Path) -> None:
        b = ModelBuilder()
        x, values = b.tensor("x", shape), np.random.default_rng(1).integers(-7, 8, (16, 8))
        scales = None if dtype == "float32" else np.linspace(0.01, 0.02, 16)
        w = b.tensor("w", dtype=dtype, values=values, scales=scales)
        y = b.tensor("y", (*shape[:-1], 16) if keep else (int(np.prod(shape[:-1])), 16))
        bias = b.tensor("b", values=np.ones(16, np.float32))
        b.operation("FULLY_CONNECTED", [x, w, bias], [y], version=5, keepNumDims=keep)
        b.build([x], [y], path)

    return build


def folded(kind: str, constants: Sequence[tuple[Any, str]] = (), **options: Any) -> Case:
    """An operation on constants only, whose result multiplies an input [2, 3, 4]."""

    def build(path: Path) -> None:
        b = ModelBuilder()
        x, shape = b.tensor("x", (2, 3, 4)), (1, 3, 4) if kind in ("TILE", "BROADCAST_TO") else (2, 3, 4)
        inputs: list[str | None] = [b.tensor("a", values=np.random.default_rng(4).uniform(1, 2, shape))]
        inputs += [b.tensor(f"c{i}", dtype=d, values=np.asarray(v, d)) for i, (v, d) in enumerate(constants)]
        c = b.tensor("c", (2, 3, 4))
        b.operation(kind, inputs, [c], version=2 if kind == "BROADCAST_TO" else 1, **options)
        y = b.tensor("y", (2, 3, 4))
        b.operation("MUL", [x, c], [y])
        b.build([x], [y], path)

    return build


def half_activation(path: Path) -> None:
    b = ModelBuilder()
    x, h, y = b.tensor("x", NHWC), b.tensor("h", NHWC, "float16"), b.tensor("y", NHWC)
    b.operation("CAST", [x], [h])
    b.operation("DEQUANTIZE", [h], [y], version=3)
    b.build([x], [y], path)


def i32(*values: Any) -> tuple[Any, str]:
    return np.array(values[0] if len(values) == 1 else values, np.int32), "int32"


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for kind in [
        "ABS",
        "CEIL",
        "COS",
        "ELU",
        "EXP",
        "FLOOR",
        "HARD_SWISH",
        "LOG",
        "LOGISTIC",
        "NEG",
        "RELU",
        "RELU6",
        "RELU_N1_TO_1",
        "ROUND",
        "RSQRT",
    ]:
        cases[kind] = apply(kind, [NHWC], NHWC)
    for kind in ["SIN", "SIGN", "SQRT", "SQUARE", "TANH", "LEAKY_RELU", "GELU"]:
        cases[kind] = apply(kind, [NHWC], NHWC)
    cases["GELU tanh"] = apply("GELU", [NHWC], NHWC, approximate=True)
    for kind in ["LOG_SOFTMAX", "L2_NORMALIZATION", "LOCAL_RESPONSE_NORMALIZATION", "ZEROS_LIKE", "RELU_0_TO_1"]:
        cases[kind] = apply(kind, [NHWC], NHWC)
    for kind in ["LOGISTIC", "RELU", "RELU6", "RSQRT", "TANH"]:
        cases[f"{kind} version 3"] = apply(kind, [NHWC], NHWC, version=3)
    for shape in ((), (4,), (3, 4), (2, 3, 4), (2, 8, 8, 4), FIVE):
        cases[f"EXP {len(shape)}-D"] = apply("EXP", [shape], shape)
        if shape:
            cases[f"SOFTMAX {len(shape)}-D"] = apply("SOFTMAX", [shape], shape, beta=1.0)
    cases["SOFTMAX beta 2"] = apply("SOFTMAX", [NHWC], NHWC, beta=2.0)
    arithmetic = [
        "ADD",
        "SUB",
        "MUL",
        "DIV",
        "MAXIMUM",
        "MINIMUM",
        "POW",
        "SQUARED_DIFFERENCE",
        "FLOOR_DIV",
        "FLOOR_MOD",
        "ATAN2",
    ]
    for kind in arithmetic:
        cases[kind] = apply(kind, [NHWC, NHWC], NHWC)
        cases[f"{kind} of one tensor"] = apply(kind, [NHWC], NHWC, same=True)
        cases[f"{kind} with a scalar input"] = apply(kind, [NHWC, ()], NHWC)
        cases[f"{kind} 5-D"] = apply(kind, [FIVE, FIVE], FIVE)
        if kind == "ATAN2":  # LiteRT's own broadcasts no constants
            continue
        cases[f"{kind} const scalar"] = apply(kind, [NHWC], NHWC, [(np.float32(3), "float32")])
        cases[f"{kind} const channels"] = apply(kind, [NHWC], NHWC, [(np.ones(4), "float32")])
    for other in ((1, 1, 1, 4), (8, 8, 4), (8, 4), (4,), (1, 8, 8, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 1)):
        cases[f"ADD broadcasts {other}"] = apply("ADD", [NHWC, other], NHWC)
    cases["MUL broadcasts both"] = apply("MUL", [(1, 8, 1, 4), (1, 1, 8, 4)], NHWC)
    cases["SUB broadcasts batch"] = apply("SUB", [(2, 8, 8, 4), NHWC], (2, 8, 8, 4))
    for shape, constant in (
        ((1, 3, 4), (1, 3, 4)),
        ((2, 3, 4), (2, 3, 4)),
        ((2, 3, 4), (3, 4)),
        ((2, 3, 4), (4,)),
        ((2, 3, 4), (1, 3, 1)),
        ((3, 4), (4,)),
        ((3, 4), (1, 4)),
        ((3, 4), (3, 4)),
        ((3, 4), (3, 1)),
        ((4,), (1,)),
        ((4,), (4,)),
        ((4,), (2, 3, 4)),
        ((1, 4), (3, 4)),
        ((1, 1, 4), (1, 3, 4)),
        ((1, 3, 4), (1, 1, 3, 4)),
        ((3, 1, 4), (1, 3, 1, 4)),
        ((3, 4, 5), (2, 3, 4, 5)),
        ((64, 16), (1, 64, 16)),
        ((1, 1, 1, 4), (2, 3, 3, 4)),
        ((2, 3, 3, 4), (2, 3, 3, 4)),
        ((2, 3, 3, 4), (3, 3, 4)),
        ((2, 3, 3, 4), (3, 1)),
    ):
        values = np.random.default_rng(3).uniform(0.5, 2, constant)
        for kind in ("ADD", "MUL", "DIV"):
            cases[f"{kind} {shape} with constant {constant}"] = apply(
                kind, [shape], np.broadcast_shapes(shape, constant), [(values, "float32")]
            )
    for shape, other in (((2, 3, 4), (3, 4)), ((64, 16), (1, 64, 16)), ((3, 4), (3, 1)), ((4,), (2, 3, 4))):
        cases[f"ADD {shape} with {other}"] = apply("ADD", [shape, other], np.broadcast_shapes(shape, other))
    cases["ADD int32"] = apply("ADD", [NHWC, NHWC], NHWC, dtype="int32")
    cases["ADD int64"] = apply("ADD", [NHWC, NHWC], NHWC, dtype="int64")
    cases["ADD relu"] = apply("ADD", [NHWC, NHWC], NHWC, fusedActivationFunction=1)
    cases["ADD sign bit"] = apply("ADD", [NHWC, NHWC], NHWC, fusedActivationFunction=5)
    cases["SUB version 3"] = apply("SUB", [NHWC, NHWC], NHWC, version=3)
    for kind in ["EQUAL", "NOT_EQUAL", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL"]:
        cases[kind] = apply(kind, [NHWC, NHWC], NHWC, out_dtype="bool")
    cases["LESS version 3"] = apply("LESS", [NHWC, NHWC], NHWC, out_dtype="bool", version=3)
    cases["ADD_N"] = apply("ADD_N", [NHWC, NHWC], NHWC)
    forms = ["float32", "float16", "dq8", "dq8pc", "dyn8", "dyn8pc"]
    for kind in ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"]:
        for form in forms:
            if (kind, form) != ("DEPTHWISE_CONV_2D", "dyn8"):  # LiteRT itself wants one scale per channel there
                cases[f"{kind} {form}"] = weighted(kind, form, 5)
    for kind in ["CONV_2D", "FULLY_CONNECTED"]:
        cases[f"{kind} dq8pc, old DEQUANTIZE"] = weighted(kind, "dq8pc", dequantize=2)
        cases[f"{kind} dyn4pc"] = weighted(kind, "dyn4pc", version=7)
        cases[f"{kind} dq4pc"] = weighted(kind, "dq4pc")
    cases["CONV_2D dq4pc, old DEQUANTIZE"] = weighted("CONV_2D", "dq4pc", dequantize=3)
    cases["CONV_2D dyn4pc version 6"] = weighted("CONV_2D", "dyn4pc", version=6)
    cases["DEPTHWISE_CONV_2D version 7"] = weighted("DEPTHWISE_CONV_2D", "float32", version=7)
    cases["FULLY_CONNECTED no bias"] = weighted("FULLY_CONNECTED", "float32", bias=False)
    for kind in ("BATCH_MATMUL", "ADD"):
        for form in ("float16", "dq8", "dq8pc"):
            cases[f"{kind} {form}"] = weighted(kind, form)
    for form in ["float32", "float16", "dq8", "dyn8", "dyn8pc", "dyn4pc"]:
        cases[f"EMBEDDING_LOOKUP {form}"] = weighted("EMBEDDING_LOOKUP", form)
    for name, x, z, y in (
        ("2-D", (3, 4), (4, 5), (3, 5)),
        ("3-D", (2, 3, 4), (2, 4, 5), (2, 3, 5)),
        ("4-D", (2, 2, 3, 4), (2, 2, 4, 5), (2, 2, 3, 5)),
        ("5-D", (1, 1, 2, 3, 4), (1, 1, 2, 4, 5), (1, 1, 2, 3, 5)),
        ("broadcast", (2, 3, 4), (1, 4, 5), (2, 3, 5)),
        ("broadcast rank", (2, 2, 3, 4), (2, 4, 5), (2, 2, 3, 5)),
        ("broadcast heads", (2, 2, 3, 4), (2, 1, 4, 5), (2, 2, 3, 5)),
    ):
        cases[f"BATCH_MATMUL {name}"] = apply("BATCH_MATMUL", [x, z], y)
    cases["BATCH_MATMUL adj_y"] = apply("BATCH_MATMUL", [(2, 3, 4), (2, 5, 4)], (2, 3, 5), adjY=True)
    for x, y in (
        (NHWC, (1, 64, 4)),
        (NHWC, (64, 4)),
        (NHWC, (256,)),
        ((2, 8, 8, 4), (16, 8, 4)),
        (NHWC, (1, 8, 2, 4, 4)),
        ((1, 8, 2, 4, 4), NHWC),
        ((1, 1, 8, 2, 4, 4), NHWC),
    ):
        cases[f"RESHAPE {x} to {y}"] = apply("RESHAPE", [x], y, [i32(y)], newShape=list(y))
    cases["RESHAPE int64"] = apply(
        "RESHAPE", [NHWC], (1, 64, 4), [i32((1, 64, 4))], dtype="int64", newShape=[1, 64, 4]
    )
    for x, p in (
        (NHWC, (0, 3, 1, 2)),
        (NHWC, (0, 2, 3, 1)),
        ((2, 8, 8, 4), (3, 2, 1, 0)),
        ((3, 4), (1, 0)),
        ((2, 3, 4), (2, 0, 1)),
        (FIVE, (0, 1, 3, 2, 4)),
    ):
        cases[f"TRANSPOSE {x} {p}"] = apply("TRANSPOSE", [x], tuple(x[i] for i in p), [i32(p)])
    for kind in ["MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD"]:
        for axes in ((1, 2), (3,), (1,), (1, 2, 3)):
            out = tuple(1 if i in axes else n for i, n in enumerate(NHWC))
            cases[f"{kind} {axes}"] = apply(kind, [NHWC], out, [i32(axes)], keepDims=True)
        cases[f"{kind} 5-D"] = apply(kind, [FIVE], (1, 2, 1, 2, 2), [i32((2,))], keepDims=True)
    cases["MEAN drops"] = apply("MEAN", [NHWC], (1, 4), [i32((1, 2))])
    cases["MEAN batch"] = apply("MEAN", [(2, 8, 8, 4)], NHWC, [i32((0,))], keepDims=True)
    cases["BROADCAST_TO"] = apply("BROADCAST_TO", [(1, 8, 1, 4)], NHWC, [i32(NHWC)], version=2)
    cases["TILE"] = apply("TILE", [(2, 3, 4)], (2, 6, 4), [i32((1, 2, 1))])
    for x, axis in ((NHWC, 3), (NHWC, 1), ((2, 8, 8, 4), 0), ((2, 3, 4), 1), ((3, 4), 1), (FIVE, 4)):
        out = tuple(2 * n if i == axis else n for i, n in enumerate(x))
        cases[f"CONCATENATION {x} {axis}"] = apply("CONCATENATION", [x, x], out, axis=axis)
    cases["CONCATENATION of one tensor"] = apply("CONCATENATION", [NHWC], (1, 8, 8, 8), same=True, axis=3)
    for x, axis in ((NHWC, 3), ((2, 8, 8, 4), 0), ((2, 3, 4), 2)):
        out = tuple(n // 2 if i == axis else n for i, n in enumerate(x))
        cases[f"SPLIT {x} {axis}"] = apply("SPLIT", [x], [out] * 2, [i32(axis)], constants_first=True, numSplits=2)
    cases["SPLIT_V"] = apply("SPLIT_V", [NHWC], [(1, 8, 8, 1), (1, 8, 8, 3)], [i32((1, 3)), i32(3)], numSplits=2)
    cases["PACK 3-D"] = apply("PACK", [(8, 8, 4)] * 2, (2, 8, 8, 4), axis=0, valuesCount=2)
    cases["PACK 4-D"] = apply("PACK", [NHWC] * 2, (1, 2, 8, 8, 4), axis=1, valuesCount=2)
    cases["UNPACK 4-D"] = apply("UNPACK", [(2, 8, 8, 4)], [(8, 8, 4)] * 2, axis=0, num=2)
    cases["UNPACK 5-D"] = apply("UNPACK", [FIVE], [(1, 2, 2, 2)] * 2, axis=1, num=2)
    for x, begin, size in (
        (NHWC, (0, 1, 2, 0), (1, 4, 4, 4)),
        ((2, 8, 8, 4), (1, 0, 0, 0), NHWC),
        ((3, 4), (1, 0), (2, 4)),
        (FIVE, (0,) * 5, (1, 2, 2, 2, 1)),
    ):
        cases[f"SLICE {x}"] = apply("SLICE", [x], size, [i32(begin), i32(size)])
    ends = [i32((0, 0, 0, 0)), i32((1, 8, 8, 4)), i32((1, 2, 2, 1))]
    cases["STRIDED_SLICE"] = apply("STRIDED_SLICE", [NHWC], (1, 4, 4, 4), ends)
    cases["STRIDED_SLICE version 3"] = apply("STRIDED_SLICE", [NHWC], (1, 4, 4, 4), ends, version=3)
    unit = [i32((0, 0, 0, 0)), i32((1, 8, 8, 4)), i32((1, 1, 1, 1))]
    cases["STRIDED_SLICE shrinks"] = apply("STRIDED_SLICE", [NHWC], (8, 8, 4), unit, shrinkAxisMask=1)
    back = [i32((0, 7, 0, 0)), i32((1, 0, 8, 4)), i32((1, -1, 1, 1))]
    cases["STRIDED_SLICE backwards"] = apply("STRIDED_SLICE", [NHWC], (1, 7, 8, 4), back)
    around, corner = ((0, 0), (1, 1), (1, 1), (0, 0)), ((0, 0), (0, 1), (0, 1), (0, 0))
    cases["PAD"] = apply("PAD", [NHWC], (1, 10, 10, 4), [i32(around)])
    cases["PAD corner"] = apply("PAD", [NHWC], (1, 9, 9, 4), [i32(corner)])
    cases["PAD 3-D"] = apply("PAD", [(2, 3, 4)], (2, 5, 4), [i32(((0, 0), (1, 1), (0, 0)))])
    cases["PAD 3-D of batch 1"] = apply("PAD", [(1, 3, 4)], (1, 5, 4), [i32(((0, 0), (1, 1), (0, 0)))])
    cases["PAD 3-D first axis"] = apply("PAD", [(1, 3, 4)], (2, 3, 4), [i32(((1, 0), (0, 0), (0, 0)))])
    cases["PAD 2-D"] = apply("PAD", [(3, 4)], (5, 4), [i32(((1, 1), (0, 0)))])
    cases["PADV2"] = apply("PADV2", [NHWC], (1, 10, 10, 4), [i32(around), (np.float32(1), "float32")])
    cases["MIRROR_PAD reflect"] = apply("MIRROR_PAD", [NHWC], (1, 10, 10, 4), [i32(around)], mode=0)
    cases["MIRROR_PAD symmetric"] = apply("MIRROR_PAD", [NHWC], (1, 10, 10, 4), [i32(around)], mode=1)
    for kind in ["RESIZE_NEAREST_NEIGHBOR", "RESIZE_BILINEAR"]:
        for align, half in ((False, False), (True, False), (False, True)):
            options = {"alignCorners": align, "halfPixelCenters": half}
            name = f"{kind}{' align' * align}{' half' * half}"
            cases[name] = apply(kind, [NHWC], (1, 16, 16, 4), [i32((16, 16))], version=3, **options)
        cases[f"{kind} version 4"] = apply(kind, [NHWC], (1, 16, 16, 4), [i32((16, 16))], version=4)
    for source, target in (("float32", "int32"), ("int32", "float32"), ("bool", "float32"), ("int32", "int64")):
        cases[f"CAST {source} to {target}"] = apply("CAST", [NHWC], NHWC, dtype=source, out_dtype=target)
    cases["GATHER 1-D"] = apply("GATHER", [(10, 4)], (3, 4), [i32((1, 3, 5))], axis=0)
    cases["GATHER channels"] = apply("GATHER", [NHWC], (1, 8, 8, 2), [i32((2, 0))], axis=3)
    cases["GATHER 2-D"] = apply("GATHER", [(10, 4)], (1, 3, 4), [i32(((1, 3, 5),))], axis=0)
    cases["GATHER scalar"] = apply("GATHER", [NHWC], (1, 8, 4), [i32(2)], axis=1)
    cases["GATHER_ND"] = apply("GATHER_ND", [(4, 8)], (2, 8), [i32(((1,), (2,)))])
    cases["EXPAND_DIMS"] = apply("EXPAND_DIMS", [(8, 8, 4)], NHWC, [i32(0)])
    cases["SQUEEZE"] = apply("SQUEEZE", [NHWC], (8, 8, 4), squeezeDims=[0])
    cases["SHAPE"] = apply("SHAPE", [NHWC], (4,), out_dtype="int32", outType=2)
    cases["RANK"] = apply("RANK", [NHWC], (), out_dtype="int32")
    cases["DEPTH_TO_SPACE"] = apply("DEPTH_TO_SPACE", [NHWC], (1, 16, 16, 1), blockSize=2)
    cases["SPACE_TO_DEPTH"] = apply("SPACE_TO_DEPTH", [NHWC], (1, 4, 4, 16), blockSize=2)
    cases["ARG_MAX"] = apply("ARG_MAX", [NHWC], (1, 8, 8), [i32(3)], out_dtype="int32", outputType=2)
    cases["ARG_MIN"] = apply("ARG_MIN", [NHWC], (1, 8, 8), [i32(3)], out_dtype="int32", outputType=2)
    for axis in range(4):
        cases[f"CUMSUM {axis}"] = apply("CUMSUM", [(2, 3, 4, 5)], (2, 3, 4, 5), [i32(axis)])
        cases[f"REVERSE_V2 {axis}"] = apply("REVERSE_V2", [(2, 3, 4, 5)], (2, 3, 4, 5), [i32((axis,))])
    cases["CUMSUM 3-D 0"] = apply("CUMSUM", [(2, 3, 4)], (2, 3, 4), [i32(0)])
    for shape in ((8,), (1, 8), (2, 3, 8), (2, 3, 4, 8)):
        linear = [(_rng.standard_normal((5, 8)), "float32"), (np.ones(5), "float32")]
        cases[f"FULLY_CONNECTED {len(shape)}-D"] = apply(
            "FULLY_CONNECTED", [shape], (*shape[:-1], 5), linear, keepNumDims=True, version=5
        )
    for form in ("int8", "int4", "float32"):
        for shape in ((1, 8, 8), (1, 9, 8), (2, 16, 8), (32, 1, 8), (1, 1, 32, 8), (1, 32, 1, 8), (2, 2, 8, 8)):
            cases[f"FULLY_CONNECTED {form} of {shape} as rows"] = rows(shape, form)
        for shape in ((1, 9, 8), (2, 3, 8), (2, 16, 8), (1, 2, 16, 8), (2, 2, 3, 8), (9, 8), (32, 8)):
            cases[f"FULLY_CONNECTED {form} of {shape}"] = rows(shape, form, keep=True)
    cases["SELECT_V2"] = _select
    cases["PRELU"] = apply("PRELU", [NHWC], NHWC, [(np.full((1, 1, 4), 0.2), "float32")])
    pool = {"strideH": 2, "strideW": 2, "filterHeight": 2, "filterWidth": 2, "padding": 1}
    for kind in ["AVERAGE_POOL_2D", "MAX_POOL_2D"]:
        cases[kind] = apply(kind, [NHWC], (1, 4, 4, 4), version=2, **pool)
        cases[f"{kind} version 3"] = apply(kind, [NHWC], (1, 4, 4, 4), version=3, **pool)
    up = [i32((1, 16, 16, 6)), (_rng.standard_normal((6, 2, 2, 4)), "float32")]
    for version in (1, 4):
        cases[f"TRANSPOSE_CONV version {version}"] = apply(
            "TRANSPOSE_CONV", [NHWC], (1, 16, 16, 6), up, constants_first=True, version=version, strideH=2, strideW=2
        )
    cases["DEQUANTIZE of an activation"] = half_activation
    cases["constant ADD"] = folded("ADD", [(_rng.uniform(1, 2, (2, 3, 4)), "float32")])
    cases["constant BROADCAST_TO"] = folded("BROADCAST_TO", [((2, 3, 4), "int32")])
    cases["constant TILE"] = folded("TILE", [((2, 1, 1), "int32")])
    cases["constant RESHAPE"] = folded("RESHAPE", [((2, 3, 4), "int32")])
    cases["constant TRANSPOSE"] = folded("TRANSPOSE", [((0, 1, 2), "int32")])
    cases["constant EXP"] = folded("EXP")
    return cases


def _select(path: Path) -> None:
    b = ModelBuilder()
    c, x, z, y = b.tensor("c", NHWC, "bool"), b.tensor("x", NHWC), b.tensor("z", NHWC), b.tensor("y", NHWC)
    b.operation("SELECT_V2", [c, x, z], [y])
    b.build([c, x, z], [y], path)


CASES = _cases()


def inputs_of(path: Path) -> dict[str, np.ndarray]:
    """Positive numbers, so that logarithms and roots are defined; small indices; booleans of both kinds."""
    from pocketfusion.mobile.delegate.graph import load

    rng, values = np.random.default_rng(2), {}
    for name, tensor in load(path).graphs[0].inputs.items():
        if tensor.dtype == "bool":
            values[name] = rng.random(tensor.shape) > 0.5
        elif tensor.dtype.startswith("int"):
            values[name] = rng.integers(1, 8, tensor.shape).astype(tensor.dtype)
        else:
            values[name] = rng.uniform(0.25, 2, tensor.shape).astype(tensor.dtype)
    return values


def ask(name: str, oracle: object, folder: Path) -> dict[str, object]:
    """The delegate's answer to a case: accepted, and if so its largest relative error in fp32, else its words."""
    from pocketfusion.mobile.delegate.graph import load
    from pocketfusion.mobile.delegate.oracle import Oracle, parity
    from pocketfusion.mobile.delegate.submodel import SIGNATURE, float_weights

    assert isinstance(oracle, Oracle)
    path = folder / "case.tflite"
    CASES[name](path)
    given = inputs_of(path)
    if any(values.dtype == np.int64 for values in given.values()):
        verdict, measured = oracle.compile(path), None
    else:
        verdict, measured = oracle.run(path, given, "fp32", SIGNATURE)
    if not verdict.accepted:
        words = verdict.failure or "; ".join(f"{kind}: {why}" for kind, why in verdict.refused.items())
        return {"accepted": False, "says": words}
    reference = folder / "float.tflite"
    expected = oracle.reference(reference if float_weights(load(path), reference) else path, given, SIGNATURE)
    if measured is None or expected.outputs is None:
        return {"accepted": True, "error": None}
    found = parity("fp32", "", [(expected.outputs, measured)])
    return {"accepted": True, "error": float(f"{found.max_error:.1e}") if found.finite else None}


def main() -> None:
    from pocketfusion.mobile.delegate.oracle import Oracle
    from pocketfusion.mobile.delegate.stack import choose, find_stacks

    stack = choose(find_stacks(), "fp32")
    assert stack is not None, "no Vulkan driver here"
    with Oracle(stack) as oracle, tempfile.TemporaryDirectory() as folder:
        answers = {name: ask(name, oracle, Path(folder)) for name in CASES}
    VERDICTS.write_text(json.dumps(answers, indent=0) + "\n")
    print(len(answers), "models,", sum(bool(a["accepted"]) for a in answers.values()), "accepted, on", stack.adapter)


if __name__ == "__main__":
    main()
