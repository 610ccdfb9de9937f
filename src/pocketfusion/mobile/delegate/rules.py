"""The GPU delegate's verdicts without a GPU: which operations it refuses, as rules.

Found by asking LiteRT 2.3's delegate (ML Drift on WebGPU) about one-operation models, and held to it:
tests/mobile/delegate compares each rule with the delegate itself, and with its recorded answers where there is no
Vulkan driver. Reasons are in the delegate's words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pocketfusion.mobile.delegate.graph import Graph, Operation, Tensor

MAX_RANK = 4

#: The operations that the delegate takes, with the newest version of each; None: any that LiteRT knows.
ACCEPTED: dict[str, int | None] = {
    **dict.fromkeys(("ABS", "CEIL", "COS", "ELU", "EXP", "FLOOR", "GELU", "HARD_SWISH", "LEAKY_RELU", "LOG"), None),
    **dict.fromkeys(("NEG", "PRELU", "RELU_N1_TO_1", "ROUND", "SIGN", "SIN", "SQRT", "SQUARE", "SOFTMAX"), None),
    **dict.fromkeys(("LOGISTIC", "RELU", "RELU6", "RSQRT", "TANH"), 2),
    **dict.fromkeys(
        ("ADD", "ADD_N", "ATAN2", "DIV", "FLOOR_DIV", "FLOOR_MOD", "MAXIMUM", "MINIMUM", "MUL", "POW"), None
    ),
    **dict.fromkeys(("SQUARED_DIFFERENCE", "GREATER", "LESS_EQUAL", "LOGICAL_AND", "LOGICAL_NOT", "LOGICAL_OR"), None),
    **dict.fromkeys(("SUB", "EQUAL", "NOT_EQUAL", "GREATER_EQUAL", "LESS"), 2),
    **dict.fromkeys(("BATCH_MATMUL", "FULLY_CONNECTED", "EMBEDDING_LOOKUP", "GATHER", "CAST", "QUANTIZE"), None),
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D"), 6),
    **dict.fromkeys(("TRANSPOSE_CONV", "DEQUANTIZE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"), 3),
    **dict.fromkeys(("AVERAGE_POOL_2D", "MAX_POOL_2D", "STRIDED_SLICE"), 2),
    **dict.fromkeys(
        ("CONCATENATION", "DEPTH_TO_SPACE", "MIRROR_PAD", "PACK", "PAD", "PADV2", "RESHAPE", "SLICE"), None
    ),
    **dict.fromkeys(("SPACE_TO_DEPTH", "SPLIT", "SPLIT_V", "TILE", "TRANSPOSE", "UNPACK", "REVERSE_V2"), None),
    **dict.fromkeys(("ARG_MAX", "CUMSUM", "ONE_HOT", "SELECT", "SELECT_V2", "TOPK_V2"), None),
    **dict.fromkeys(("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN", "REDUCE_PROD"), None),
}
#: Operations on two tensors element by element, which broadcast.
ELEMENTWISE = frozenset(
    ("ADD", "ATAN2", "DIV", "EQUAL", "FLOOR_DIV", "FLOOR_MOD", "GREATER", "GREATER_EQUAL", "LESS", "LESS_EQUAL")
    + ("MAXIMUM", "MINIMUM", "MUL", "NOT_EQUAL", "POW", "SQUARED_DIFFERENCE", "SUB")
)
_TAKES_SAME = frozenset({"ADD", "MUL"})
#: Takes two constants; every other operation needs an input that is computed.
_FOLDS = frozenset({"ADD", "DEQUANTIZE"})
#: Where integer weights may come through a DEQUANTIZE; elsewhere the delegate mistakes their shape.
_TAKES_DEQUANTIZED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D"})
#: Up to so many rows a linear layer of integer weights is another shader, which compiles and is wrong (`faults`).
_ROWS = 8
_SIGN_BIT = 5  # schema.ActivationFunctionType.SIGN_BIT
_REFLECT = 0  # schema.MirrorPadMode.REFLECT


@dataclass(frozen=True)
class Rejection:
    """An operation that the delegate refuses, and why."""

    operation: Operation
    reason: str


def rejections(graph: Graph) -> list[Rejection]:
    """The operations that the delegate would refuse, in the graph's order, each with the first reason that holds."""
    found = []
    for operation in graph.operations:
        reason = next((reason for rule in _RULES for reason in rule(graph, operation)), None)
        if reason is not None:
            found.append(Rejection(operation, reason))
    return found


Rule = Callable[[Graph, Operation], Iterator[str]]


def _runtime(operation: Operation) -> list[Tensor]:
    return [t for t in operation.given if not t.constant]


def _known(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind not in ACCEPTED:
        yield "Operation is not supported."
    newest = ACCEPTED.get(operation.kind)
    halves = operation.kind == "DEQUANTIZE" and operation.given[0].dtype == "float16"
    if newest is not None and operation.version > newest and not halves:
        yield f"Max version supported: {newest}. Requested version {operation.version}."


def _rank(graph: Graph, operation: Operation) -> Iterator[str]:
    for tensor in (*_runtime(operation), *operation.outputs):
        if len(tensor.shape) > MAX_RANK:
            yield f"Tensor dimensions must be less than {MAX_RANK + 1}: {tensor}"


def _types(graph: Graph, operation: Operation) -> Iterator[str]:
    for tensor in (*_runtime(operation), *operation.outputs):
        if tensor.dtype in ("int64", "uint64", "float64", "string", "complex64"):
            yield f"Tensor type({tensor.dtype.upper()}) is not supported."


def _constant_inputs(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind not in _FOLDS and operation.given and not _runtime(operation):
        yield "Expected a runtime input tensor, but all inputs are constant."


def _pairs(graph: Graph, operation: Operation) -> Iterator[str]:
    """Operations on two computed tensors: neither may be a scalar, and few take the same one twice."""
    runtime = _runtime(operation)
    if len(runtime) < 2:
        return
    if operation.kind in ELEMENTWISE and any(not tensor.shape for tensor in runtime):
        yield "Tensor has bad input dims size: 0."
    if operation.kind in ELEMENTWISE - _TAKES_SAME and len({tensor.index for tensor in runtime}) == 1:
        yield "No support of few identical inputs in the same operation."


def _dequantize(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind != "DEQUANTIZE":
        return
    weights, readers = operation.given[0], graph.consumers.get(operation.outputs[0].index, [])
    kinds = {reader.kind for reader in readers}
    if not weights.constant:
        if weights.dtype == "float16":
            yield "Dequantize for Densify is not supported"
    elif "EMBEDDING_LOOKUP" in kinds:
        yield "EMBEDDING_LOOKUP: Empty quantization params."
    elif weights.dtype != "float16" and (others := sorted(kinds - _TAKES_DEQUANTIZED)):
        yield f"Shape mismatch: {weights.dtype} weights through DEQUANTIZE into {', '.join(others)}"


def _settings(graph: Graph, operation: Operation) -> Iterator[str]:
    kind, options = operation.kind, operation.options
    if kind == "SOFTMAX" and options.beta != 1:
        yield "Softmax.beta != 1 is not supported."
    if kind == "MIRROR_PAD" and options.mode != _REFLECT:
        yield "Only Reflective padding is supported for Mirror Pad operation."
    if kind == "STRIDED_SLICE" and options.shrinkAxisMask:
        yield "Slice does not support shrink_axis_mask parameter."
    if kind == "STRIDED_SLICE" and (strides := operation.given[3].values) and (strides() < 0).any():
        yield "Reverse slices are not supported."
    if getattr(options, "fusedActivationFunction", 0) == _SIGN_BIT:
        yield "Unsupported fused activation: SIGN_BIT"


def _shapes(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind in ("PAD", "PADV2") and operation.given[1].shape[0] not in (3, 4):
        yield f"Invalid paddings tensor shape: expected 4x2 or 3x2, got {operation.given[1].shape[0]}x2"
    if operation.kind == "GATHER" and len(operation.given[1].shape) != 1:
        yield "Only support 1D indices"


def _integer_linear(graph: Graph, operation: Operation) -> Iterator[str]:
    """A layer of integer weights that takes [1, ..., K] for rows: the delegate's shader does not compile."""
    if operation.kind != "FULLY_CONNECTED":
        return
    x, weights, rows = operation.given[0], operation.given[1], operation.outputs[0]
    if not (weights.constant and weights.dtype in ("int8", "int4")) or len(rows.shape) != 2 or len(x.shape) < 3:
        return
    if x.shape[0] == 1 and rows.shape[0] > _ROWS:
        yield f"Unable to parse bc coord for BATCH axis: {weights.dtype} weights, and {x} taken for rows"


_RULES: tuple[Rule, ...] = (
    _known,
    _rank,
    _types,
    _dequantize,
    _constant_inputs,
    _pairs,
    _settings,
    _shapes,
    _integer_linear,
)
