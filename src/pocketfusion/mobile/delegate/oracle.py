"""Asks the real GPU delegate: does it take a file whole, which kinds of operation does it refuse, how right is it.

The delegate is LiteRT's for WebGPU (ML Drift), compiled GPU only: with the CPU allowed beside it, refused graphs have
been reported as fully accelerated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from ai_edge_litert.schema_py_generated import BuiltinOperator

from pocketfusion.mobile.delegate.child import Answer, Child
from pocketfusion.mobile.delegate.graph import File, Graph
from pocketfusion.mobile.delegate.stack import GpuStack
from pocketfusion.mobile.delegate.submodel import extract
from pocketfusion.temporaries import scratch_folder

#: Largest error, relative to the largest value, that still counts as right.
MAX_ERROR = {"fp32": 1e-3, "fp16": 0.03}

#: What LiteRT says when a GPU's results are not there in the time that it waits for them, and how often to ask then.
_LATE, _TRIES = "Failed to lock custom tensor buffer", 3
_REFUSED = "operations are not supported by GPU delegate:\n"
_WHY = re.compile(r"^(?:ERROR: |E\d{4} [^\]]*\] )(.+)$", re.M)
_PREFIX = re.compile(r"^Failed to create \S+: [A-Z_]+: ")
_NOISE = ("Following operations", "Restored original", "Failed to initialize kernel", "[./litert")


@dataclass(frozen=True)
class Verdict:
    """What the delegate said of a graph.

    `refused`: its words by the kind of operation; `failure`: why it failed as a whole (native error, crash, no answer
    in time), empty if it did not. Both empty: all of it is on the GPU.
    """

    refused: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    @property
    def accepted(self) -> bool:
        return not self.refused and not self.failure


@dataclass(frozen=True)
class Parity:
    """A graph on the GPU against the CPU: over all outputs and inputs together.

    `max_error` is relative to the largest CPU value of each output; both are NaN if a result is not finite.
    `sqnr_db` is at most 200 (equal). `worst` names the worst output.
    """

    precision: str
    stack: str
    sqnr_db: float
    max_error: float
    finite: bool
    worst: str = ""

    @property
    def right(self) -> bool:
        return self.finite and self.max_error <= MAX_ERROR[self.precision]


class Oracle:
    """A GPU stack with a process that compiles and runs on it. Use it as a context manager."""

    def __init__(self, stack: GpuStack, *, threads: int = 1, timeout: float = 600) -> None:
        """`timeout`: seconds after which a compilation with its run counts as hanging."""
        self.stack, self.timeout = stack, timeout
        self._scratch = ExitStack()
        self.folder = self._scratch.enter_context(scratch_folder("pocketfusion-check"))
        self._child = Child(dict(stack.environment), self.folder, threads)

    def __enter__(self) -> Oracle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._child.__exit__(kind, error, tb)
        self._scratch.close()

    def compile(self, path: Path, precision: str = "fp32") -> Verdict:
        """The delegate's verdict on the file, all its signatures together."""
        return verdict(self._child.ask(path, precision=precision, timeout=self.timeout))

    def compile_part(self, file: File, graph: Graph, chosen: list[int], precision: str = "fp32") -> Verdict:
        """The verdict on some operations of a graph, cut out."""
        part = self.folder / "part.tflite"
        extract(file, graph, chosen, part)
        return self.compile(part, precision)

    def run(
        self, path: Path, inputs: Mapping[str, np.ndarray], precision: str, signature: str
    ) -> tuple[Verdict, dict[str, np.ndarray] | None]:
        """The verdict on the file and what its signature computes of `inputs` on the GPU.

        Asks again where the GPU was late: a driver in software has then compiled more of its shaders.
        """
        for _ in range(_TRIES):
            answer = self._child.ask(path, inputs, precision=precision, signature=signature, timeout=self.timeout)
            if _LATE not in answer.error:
                break
            self._child.stop()
        return verdict(answer), answer.outputs

    def reference(self, path: Path, inputs: Mapping[str, np.ndarray], signature: str) -> Answer:
        """What LiteRT computes on the CPU, in the same process apart."""
        return self._child.ask(path, inputs, device="cpu", signature=signature, timeout=self.timeout)


def verdict(answer: Answer) -> Verdict:
    """Reads the delegate's words out of a job's native messages."""
    if not answer.error:
        return Verdict()
    refused: dict[str, str] = {}
    for block in answer.log.split(_REFUSED)[1:]:
        for line in block.splitlines():
            kind, _, reason = line.partition(": ")
            if not hasattr(BuiltinOperator, kind):
                break  # the list has ended
            refused.setdefault(kind, reason.strip() or "refused because of its neighbour")
    if answer.ended:
        return Verdict(refused, answer.error)
    if refused:
        return Verdict(refused)
    if _LATE in answer.error:
        return Verdict({}, f"the GPU was late {_TRIES} times ({_LATE}): run again where its cores are free")
    reasons = [line for line in _WHY.findall(answer.log) if not line.startswith(_NOISE)]
    return Verdict({}, _PREFIX.sub("", reasons[0].strip()) if reasons else " ".join(answer.error.split())[:300])


def parity(
    precision: str, stack: str, pairs: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]
) -> Parity:
    """Compares pairs of results by name: the CPU's, then the GPU's."""
    signal = noise = 0.0
    worst, worst_name = 0.0, ""
    for expected, measured in pairs:
        for name, reference in expected.items():
            given = reference.astype(np.float64)
            difference = measured[name].astype(np.float64) - given
            if not np.isfinite(difference).all():
                return Parity(precision, stack, float("nan"), float("nan"), False, name)
            signal, noise = signal + float(np.square(given).sum()), noise + float(np.square(difference).sum())
            scale = float(np.abs(given).max(initial=0)) or 1.0
            error = float(np.abs(difference).max(initial=0)) / scale
            if error > worst or not worst_name:
                worst, worst_name = max(error, worst), name
    ratio = 10 * np.log10(signal / noise) if noise and signal else (200.0 if not noise else float("-inf"))
    return Parity(precision, stack, min(200.0, float(ratio)), worst, True, worst_name)
