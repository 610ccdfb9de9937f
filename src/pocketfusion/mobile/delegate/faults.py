"""Operations that the delegate takes and computes wrongly, in FP32, without a word: what compiling does not show.

Found by comparing one-operation models with the CPU on two drivers (SwiftShader and lavapipe agree in each), and held
to it by the same tests as `rules`. Most come from how tensors of fewer than four dimensions are laid out as batch,
height, width, channels (BHWC): a computed tensor of one dimension is B, of two BC, of three BWC; a constant of one is
C, of two WC, of three HWC. Where the two meet, numpy's alignment to the last dimension holds only by luck.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pocketfusion.mobile.delegate.graph import Graph, Operation, Tensor
from pocketfusion.mobile.delegate.rules import ELEMENTWISE, Rejection

#: Where a dimension, counted from the last, lies in BHWC; by the tensor's rank.
_COMPUTED = {1: "B", 2: "CB", 3: "CWB", 4: "CWHB"}
_CONSTANT = {1: "C", 2: "CW", 3: "CWH", 4: "CWHB"}


def faults(graph: Graph) -> list[Rejection]:
    """The operations that compile and give wrong numbers, in the graph's order, each with what is wrong."""
    found = []
    for operation in graph.operations:
        reason = next((reason for rule in _RULES for reason in rule(graph, operation)), None)
        if reason is not None:
            found.append(Rejection(operation, f"taken, but computed wrongly: {reason}"))
    return found


def _constants(graph: Graph, operation: Operation) -> Iterator[str]:
    """Elementwise operations on a computed tensor and a constant that lie differently in BHWC."""
    if operation.kind not in ELEMENTWISE:
        return
    fixed = [t for t in operation.given if _fixed(graph, t)]
    computed = [t for t in operation.given if t not in fixed]
    if len(fixed) != 1 or len(computed) != 1 or len(operation.outputs[0].shape) > 4:
        return
    places = _COMPUTED.get(len(operation.outputs[0].shape), "")
    misplaced = [t for t, layout in ((fixed[0], _CONSTANT), (computed[0], _COMPUTED)) if _misplaced(t, layout, places)]
    batch = fixed[0].shape[0] if len(fixed[0].shape) == 4 else 1
    if misplaced or (batch > 1 and (len(computed[0].shape) < 4 or computed[0].shape[0] == 1)):
        yield f"the constant {_form(fixed[0])} and the tensor {_form(computed[0])} are not aligned"


def _fixed(graph: Graph, tensor: Tensor) -> bool:
    """True for a constant, and for one that is only dequantised."""
    maker = graph.producers.get(tensor.index)
    return tensor.constant or (tensor.index in graph.folded and maker is not None and maker.kind == "DEQUANTIZE")


def _misplaced(tensor: Tensor, layout: dict[int, str], places: str) -> bool:
    """True if a dimension above 1 lies elsewhere than the output's, counted from the last."""
    own = layout.get(len(tensor.shape), "")
    return any(n > 1 and a != b for n, a, b in zip(tensor.shape[::-1], own, places, strict=False))


def _matmul(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind != "BATCH_MATMUL":
        return
    first, second = operation.given[:2]
    if len(second.shape) == 2 and _fixed(graph, second):
        return
    if _stacks(first) != _stacks(second):
        yield f"the batches {_form(first)} and {_form(second)} are broadcast"


def _stacks(tensor: Tensor) -> tuple[int, ...]:
    shape = tensor.shape[:-2]
    return (1,) * (2 - len(shape)) + shape


def _one_dimension(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind in ("SOFTMAX", "FULLY_CONNECTED") and len(operation.given[0].shape) == 1:
        yield "a tensor of one dimension lies along the batch"


def _padding(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind not in ("PAD", "PADV2") or len(operation.given[0].shape) != 3:
        return
    paddings = operation.given[1].values
    if operation.given[0].shape[0] > 1 or (paddings is not None and paddings()[0].any()):
        yield "the first dimension of three is the batch, the paddings take it for the height"


def _embedding(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind == "EMBEDDING_LOOKUP" and operation.given[1].scales == 1:
        yield "an integer table needs one scale per row"


def _axes(graph: Graph, operation: Operation) -> Iterator[str]:
    if operation.kind not in ("CUMSUM", "REVERSE_V2") or (axis := operation.given[1].values) is None:
        return
    rank = len(operation.given[0].shape)
    places = {int(a) % rank for a in axis().reshape(-1)}
    if operation.kind == "CUMSUM" and 0 in places and rank < 4:
        yield "along the batch"
    if operation.kind == "REVERSE_V2" and rank == 4 and 3 in places:
        yield "along the channels"


def _form(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _integer_rows(graph: Graph, operation: Operation) -> Iterator[str]:
    """The same meeting of dimensions as `rules._integer_linear`, where the shader compiles."""
    if operation.kind != "FULLY_CONNECTED" or operation.given[1].dtype not in ("int8", "int4"):
        return
    x, rows = operation.given[0], operation.outputs[0]
    if len(rows.shape) == 2 and any(n > 1 for n in x.shape[1:-1]):
        yield f"{operation.given[1].dtype} weights, and {_form(x)} is taken for {rows.shape[0]} rows"


_RULES: tuple[Callable[[Graph, Operation], Iterator[str]], ...] = (
    _constants,
    _matmul,
    _one_dimension,
    _padding,
    _embedding,
    _axes,
    _integer_rows,
)
