"""What to do about a refused operation or a layer at risk: the name of a rewrite where one cures it.

The names are those of `mobile.rewrites.PASSES`; advice that is no rewrite is a phrase.
"""

from __future__ import annotations

from pocketfusion.mobile.delegate.graph import Graph, Operation

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
