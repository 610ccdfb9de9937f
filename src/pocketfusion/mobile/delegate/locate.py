"""From the delegate's words to operations: which of a refused kind are refused, and what cures each.

The delegate names kinds of operation, not which: every distinct operation of those kinds, and every one that the rules
refuse, is cut out and asked about on its own. A cure is the name of a rewrite (`mobile.rewrites.PASSES`); advice that
is no rewrite is a phrase.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketfusion.mobile.delegate.faults import faults
from pocketfusion.mobile.delegate.graph import File, Graph, Operation
from pocketfusion.mobile.delegate.oracle import Oracle, Verdict
from pocketfusion.mobile.delegate.rules import rejections

INT8_ADVICE = "weights `int8-dynamic` or `float16`"

_FAULTS = {
    "BATCH_MATMUL": "rewrite `attention`, or give both factors the same batch",
    "SOFTMAX": "reshape it to 2 dimensions",
    "FULLY_CONNECTED": "reshape its input to 2 dimensions, or rewrite `linear-to-conv`",
    "PAD": "rewrite `padding`",
    "PADV2": "rewrite `padding`",
    "EMBEDDING_LOOKUP": "one scale per row, or weights `float32`",
    "CUMSUM": "reshape it to 4 dimensions",
    "REVERSE_V2": "move the channels to another axis first",
}


@dataclass(frozen=True)
class Refused:
    """An operation that falls off the GPU: index, kind, tensors, module ("" if unknown), the reason, the cure."""

    index: int
    operation: str
    tensors: str
    module: str
    reason: str
    cure: str


def refused(graph: Graph, operation: Operation, reason: str) -> Refused:
    """The report of one refused operation."""
    given = ", ".join("none" if tensor is None else str(tensor) for tensor in operation.inputs)
    tensors = f"{given} -> {', '.join(map(str, operation.outputs))}"
    return Refused(
        operation.index, operation.kind, tensors, module(graph, operation), reason, cure(graph, operation, reason)
    )


def module(graph: Graph, operation: Operation) -> str:
    """The operation's module; of one whose tensors do not tell, that of what it reads or of what reads it."""
    if operation.module:
        return operation.module
    readers = [reader for tensor in operation.outputs for reader in graph.consumers.get(tensor.index, [])]
    makers = [graph.producers[tensor.index] for tensor in operation.given if tensor.index in graph.producers]
    return next((other.module for other in (*makers, *readers) if other.module), "")


def static(graph: Graph) -> list[Refused]:
    """What the rules refuse of the graph, and what they know to be computed wrongly."""
    return [refused(graph, one.operation, one.reason) for one in rejections(graph)] + wrong(graph)


def wrong(graph: Graph) -> list[Refused]:
    """What the delegate takes but is known to compute wrongly."""
    return [refused(graph, one.operation, one.reason) for one in faults(graph)]


def locate(oracle: Oracle, file: File, graph: Graph, verdict: Verdict, precision: str) -> list[Refused]:
    """The operations that make the delegate say `verdict`, each with its reason in the delegate's words."""
    by_rule = {one.operation.index: one.reason for one in rejections(graph)}
    asked: dict[str, str] = {}
    found = []
    for operation in graph.operations:
        if operation.kind not in verdict.refused and operation.index not in by_rule:
            continue
        unit, signature = _unit(graph, operation)
        if signature not in asked:
            alone = oracle.compile_part(file, graph, unit, precision)
            asked[signature] = alone.refused.get(operation.kind) or next(iter(alone.refused.values()), alone.failure)
        if asked[signature]:
            found.append(refused(graph, operation, asked[signature]))
    return found


def _unit(graph: Graph, operation: Operation) -> tuple[list[int], str]:
    """Operations to ask about together, one that only makes weights with what reads them, and a key for equals."""
    unit = [operation]
    if graph.folded & {tensor.index for tensor in operation.outputs}:
        readers = [reader for tensor in operation.outputs for reader in graph.consumers.get(tensor.index, [])]
        unit += [reader for reader in readers if reader not in unit]
    return [one.index for one in unit], " + ".join(one.signature() for one in unit)


def cure(graph: Graph, operation: Operation, reason: str) -> str:
    """The cure of an operation that the delegate refuses for `reason`."""
    kind = operation.kind
    if "computed wrongly" in reason:
        return _FAULTS.get(kind, "reshape both to 4 dimensions, the constant's first being 1")
    if kind == "DEQUANTIZE" or "Shape mismatch" in reason:
        linear = any(r.kind == "FULLY_CONNECTED" for t in operation.outputs for r in graph.consumers.get(t.index, []))
        return f"{INT8_ADVICE}, or rewrite `linear-to-conv`" if linear and operation.version <= 3 else INT8_ADVICE
    if kind == "FULLY_CONNECTED" and "BATCH axis" in reason:
        return "rewrite `linear-to-conv`, or weights `float16`"
    if kind == "EMBEDDING_LOOKUP":
        return "weights `float32` or `int8-dynamic` for this table"
    if kind in ("CONV_2D", "DEPTHWISE_CONV_2D") and "version" in reason:
        return "weights `int8-dynamic` or `float16` for this layer"
    if kind in ("PAD", "PADV2", "MIRROR_PAD"):
        return "rewrite `padding`"
    if kind == "GATHER_ND" or (kind == "BROADCAST_TO" and _leads_to_softmax(graph, operation)):
        return "rewrite `masks`" if kind == "BROADCAST_TO" or _in(operation, "mask", "embed") else _slices()
    if "INT64" in reason:
        return "make it int32"
    if "identical inputs" in reason:
        return "rewrite `attention`" if kind == "DIV" else "use one tensor once: x/x is 1, x-x is 0, max(x, x) is x"
    if "all inputs are constant" in reason or "runtime input" in reason:
        return "compute it before conversion: it depends on constants only"
    if _norm(graph, operation):
        return "rewrite `group-norm`"
    if (
        "dimensions" in reason
        or "dims" in reason
        or "rank" in reason.lower()
        or "layout" in reason
        or "Perm" in reason
    ):
        if _in(operation, "attn", "attention", "to_q", "to_k", "to_v", "qkv"):
            return "rewrite `attention`"
        return "rewrite `upsample`" if _in(operation, "upsampl") else "keep tensors at 1 to 4 dimensions"
    if kind == "BROADCAST_TO":
        return "let the next operation broadcast instead of expanding"
    if kind in ("SQUEEZE", "EXPAND_DIMS"):
        return "use RESHAPE"
    return "compute it outside the network, or of operations that the delegate takes (docs/check.md)"


def risk_cure(operation: Operation) -> str:
    """The cure of an operation whose numbers come near the limits of fp16."""
    if _in(operation, "norm") or operation.kind == "SQUARED_DIFFERENCE":
        return "rewrite `group-norm` or `layer-norm`"
    if operation.kind == "BATCH_MATMUL" or _in(operation, "attn", "attention"):
        return "rewrite `attention`"
    if operation.kind == "GELU" or _in(operation, "gelu", "act"):
        return "rewrite `gelu`"
    if operation.kind in ("SIN", "COS") or _in(operation, "time"):
        return "rewrite `time-embedding`"
    return "scale its input down, or keep it out of fp16"


def _slices() -> str:
    return "take slices or GATHER with 1-D indices"


def _in(operation: Operation, *words: str) -> bool:
    names = " ".join(tensor.name for tensor in operation.outputs).lower()
    return any(word in names for word in words)


def _norm(graph: Graph, operation: Operation) -> bool:
    """True in a normalisation: by its name, or since the tensor comes from an RSQRT."""
    if _in(operation, "groupnorm", "group_norm", "norm"):
        return True
    seen: list[Operation] = [operation]
    for _ in range(4):
        seen = [graph.producers[t.index] for o in seen for t in o.given if t.index in graph.producers]
        if any(o.kind == "RSQRT" for o in seen):
            return True
    return False


def _leads_to_softmax(graph: Graph, operation: Operation) -> bool:
    """True for a mask: what is expanded here is added to attention scores."""
    seen = [operation]
    for _ in range(4):
        seen = [r for o in seen for t in o.outputs for r in graph.consumers.get(t.index, [])]
        if any(o.kind == "SOFTMAX" for o in seen):
            return True
    return False
