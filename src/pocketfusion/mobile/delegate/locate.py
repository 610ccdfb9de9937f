"""From the delegate's words to operations: which of a refused kind are refused, and what cures each.

The delegate names kinds of operation, not which: every distinct operation of those kinds, and every one that the rules
refuse, is cut out and asked about on its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketfusion.mobile.delegate.cures import cure
from pocketfusion.mobile.delegate.faults import faults
from pocketfusion.mobile.delegate.graph import File, Graph, Operation
from pocketfusion.mobile.delegate.oracle import Oracle, Verdict
from pocketfusion.mobile.delegate.rules import rejections


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
