"""Finds what makes a graph fail as a whole: the shortest run of operations that fails in the same way on its own.

Two binary searches: the shortest failing beginning, then the latest start that still fails with that end. Each probe
is a compilation (and, for wrong numbers, a run on GPU and CPU) of a part cut out by `surgery.extract`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketfusion.mobile.delegate.graph import File, Graph, Operation
from pocketfusion.mobile.delegate.oracle import Oracle, parity
from pocketfusion.mobile.delegate.submodel import SIGNATURE, extract, key


@dataclass(frozen=True)
class Culprit:
    """The shortest failing run of operations, and how it failed on its own."""

    operations: tuple[Operation, ...]
    failure: str


#: Says of operations [start, end) how they fail, empty if they do not.
Probe = Callable[[int, int], str]


def bisect(graph: Graph, probe: Probe) -> Culprit | None:
    """The culprit, or None if the whole graph, cut out, does not fail."""
    count = len(graph.operations)
    failure = probe(0, count)
    if not failure:
        return None
    low, end = 0, count  # [0, low) is sound, [0, end) fails
    while end - low > 1:
        middle = (low + end) // 2
        if reason := probe(0, middle):
            end, failure = middle, reason
        else:
            low = middle
    start, high = 0, end  # [start, end) fails, [high, end) is empty
    while high - start > 1:
        middle = (start + high) // 2
        if reason := probe(middle, end):
            start, failure = middle, reason
        else:
            high = middle
    return Culprit(graph.operations[start:end], failure)


def compile_probe(oracle: Oracle, file: File, graph: Graph, precision: str) -> Probe:
    """Fails where the delegate fails as a whole: crash, no answer, native error. Refused operations do not count."""

    def probe(start: int, end: int) -> str:
        chosen = _runtime(graph, start, end)
        return oracle.compile_part(file, graph, chosen, precision).failure if chosen else ""

    return probe


def number_probe(oracle: Oracle, file: File, graph: Graph, precision: str, inputs: Mapping[str, np.ndarray]) -> Probe:
    """Fails where the graph's results are wrong if the GPU computes this part of it and the CPU the rest.

    Judged by the results, not by the part's own: a mean that is next to nothing may be off by its own size and harm
    nobody. `inputs`: arrays by the signature's names.
    """
    given = {key(tensor): inputs[name] for name, tensor in graph.inputs.items()}
    part, count = oracle.folder / "part.tflite", len(graph.operations)
    results = {key(tensor) for tensor in graph.outputs.values()}

    def compute(start: int, end: int, values: Mapping[str, np.ndarray], gpu: bool = False) -> tuple[Any, str]:
        """`values` and what the part makes of them; else None and the failure."""
        chosen = _runtime(graph, start, end)
        if not chosen:
            return values, ""
        reads, _ = extract(file, graph, chosen, part)
        feed = {key(tensor): values[key(tensor)] for tensor in reads}
        if gpu:
            verdict, outputs = oracle.run(part, feed, precision, SIGNATURE)
            return (None, verdict.failure) if outputs is None else ({**values, **outputs}, "")
        outputs = oracle.reference(part, feed, SIGNATURE).outputs
        return (None, "") if outputs is None else ({**values, **outputs}, "")

    def pick(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: values[name] for name in results if name in values}

    expected, _ = compute(0, count, given)

    def probe(start: int, end: int) -> str:
        before, failure = compute(0, start, given)
        inside, failure = (None, failure) if before is None else compute(start, end, before, gpu=True)
        after, _ = (None, "") if inside is None else compute(end, count, inside)
        if after is None or expected is None:
            return failure
        found = parity(precision, oracle.stack.name, [(pick(expected), pick(after))])
        return "" if found.right else _describe(found.finite, found.max_error)

    return probe


def _describe(finite: bool, error: float) -> str:
    return f"the results are off by {error:.2%} of their largest value" if finite else "it gives NaN or infinity"


def _runtime(graph: Graph, start: int, end: int) -> list[int]:
    """Operations of the range that work on more than constants; those that do not come with their readers."""
    return [op.index for op in graph.operations[start:end] if not graph.folded & {t.index for t in op.outputs}]
