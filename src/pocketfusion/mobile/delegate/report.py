"""What a check found: of each graph, and of the whole bundle or file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketfusion.mobile.delegate.locate import Refused
from pocketfusion.mobile.delegate.oracle import Parity
from pocketfusion.mobile.delegate.ranges import Ranges
from pocketfusion.mobile.delegate.stack import GpuStack


@dataclass(frozen=True)
class GraphCheck:
    """One signature of one file.

    `refused`: the operations that the delegate does not take, and those that it takes but computes wrongly (`faults`).
    `verdict`: "gpu", "static" (no GPU stack was asked), "refused" or "failed". `failure`: why the graph failed as a
    whole; `culprit`: the shortest run of operations that fails alone, for that or for wrong numbers. `inputs`:
    "recorded" or "seeded". `notes`: what was left out, and why. `precision`: what the bundle's manifest says that the
    GPU computes this network in; wrong numbers in fp16 do not count against one in fp32.
    """

    network: str
    signature: str
    operations: int
    verdict: str
    refused: tuple[Refused, ...]
    failure: str
    culprit: str
    parities: tuple[Parity, ...]
    ranges: Ranges | None
    inputs: str
    notes: tuple[str, ...]
    precision: str = "fp16"

    def counts(self, parity: Parity) -> bool:
        """Whether the comparison is in a precision that the network is used in: fp32 is everywhere."""
        return parity.precision in ("fp32", self.precision)

    @property
    def passed(self) -> bool:
        return not self.refused and not self.failure and all(one.right for one in self.parities if self.counts(one))


@dataclass(frozen=True)
class Report:
    """The whole check; `stacks` are the drivers that were asked, none for a static one.

    `target`: what a bundle was made for; None for a lone file.
    """

    path: Path
    target: str | None
    stacks: tuple[GpuStack, ...]
    graphs: tuple[GraphCheck, ...]

    @property
    def passed(self) -> bool:
        return all(graph.passed for graph in self.graphs)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values; numbers that are not finite become null."""
        stacks = [{"name": s.name, "adapter": s.adapter, "precisions": s.precisions} for s in self.stacks]
        graphs = [asdict(graph) | {"passed": graph.passed} for graph in self.graphs]
        about = {"path": str(self.path), "target": self.target, "passed": self.passed}
        return _finite(about | {"stacks": stacks, "graphs": graphs})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
