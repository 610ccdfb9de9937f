"""Does a bundle or a `.tflite` file run on the GPU delegate, all of it and rightly: the whole check and its report."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.delegate import bisect, calibration, locate
from pocketfusion.mobile.delegate.calibration import Ranges, activation_bytes, calibrate
from pocketfusion.mobile.delegate.graph import File, Graph, load
from pocketfusion.mobile.delegate.locate import Refused
from pocketfusion.mobile.delegate.oracle import Oracle, Parity, Verdict, parity
from pocketfusion.mobile.delegate.stack import GpuStack, advice, choose, find_stacks
from pocketfusion.mobile.delegate.submodel import SIGNATURE, extract, float_weights, key
from pocketfusion.runtime.manifest import NETWORKS, Bundle
from pocketfusion.temporaries import scratch_folder


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


PRECISIONS = ("fp32", "fp16")
#: Calls whose results are compared: the network's first and last of the recorded ones.
COMPARED = 2
Progress = Callable[[str], None]


def check(
    path: Path,
    *,
    static: bool = False,
    stack: str | None = None,
    precisions: tuple[str, ...] = PRECISIONS,
    threads: int = 1,
    timeout: float = 600,
    progress: Progress = lambda stage: None,
) -> Report:
    """Checks the bundle or `.tflite` file at `path` in each of `precisions` that a driver here has.

    `static`: by the rules alone, without a driver, numbers or calibration. `stack`: the driver to ask, by name.
    `timeout`: seconds that one compilation with its run may take. `progress` is told each stage.

    Raises PocketfusionError for what is neither, a damaged file, custom operations, an unknown stack, a driver that is
    named and does not work, and if the drivers here have none of `precisions`.
    """
    files, recorded, needs = _files(path), dict[str, calibration.Inputs](), _precisions(path)
    target = Bundle.open(path, verify=False).manifest.target if path.is_dir() else None
    progress("looking for GPU stacks")
    stacks = () if static else find_stacks()
    chosen = {p: found for p in precisions if (found := None if static else choose(stacks, p, stack))}
    if stacks and not chosen:
        asked = [one for one in stacks if stack in (None, one.name)]
        here = ", ".join(f"{one.name} in {' and '.join(one.precisions)}" for one in asked)
        raise PocketfusionError(f"no GPU stack here computes in {' or '.join(precisions)} ({here}): {advice()}")
    if path.is_dir() and not static:
        progress("drawing a picture for the networks' inputs")
        recorded = calibration.recorded(path, threads)
    graphs = []
    for name, file in files.items():
        for graph in file.graphs:
            one = _Check(name, file, graph, recorded.get(name), needs.get(name, "fp16"), threads, timeout, progress)
            graphs.append(one.run(chosen) if not static else one.static(()))
    return Report(path, target, tuple(dict.fromkeys(chosen.values())), tuple(graphs))


def _files(path: Path) -> dict[str, File]:
    if not path.is_dir():
        return {path.stem: load(path)}
    bundle = Bundle.open(path)
    return {name: load(bundle.file(name)) for name in NETWORKS}


def _precisions(path: Path) -> dict[str, str]:
    """What the manifest of a bundle asks for, by network; nothing for a lone file."""
    if not path.is_dir():
        return {}
    networks = Bundle.open(path, verify=False).manifest.networks
    return {name: getattr(networks, name).gpu_precision or "fp16" for name in NETWORKS}


class _Check:
    """One graph's check."""

    def __init__(
        self,
        name: str,
        file: File,
        graph: Graph,
        inputs: calibration.Inputs | None,
        precision: str,
        threads: int,
        timeout: float,
        progress: Progress,
    ) -> None:
        self.name, self.file, self.graph, self.threads, self.timeout = name, file, graph, threads, timeout
        self.precision = precision
        self.inputs, self.source = (inputs, "recorded") if inputs else (calibration.seeded(graph), "seeded")
        self.title = name if len(file.graphs) == 1 else f"{name} {graph.name}"
        self.progress = lambda stage: progress(f"{self.title}: {stage}")
        self.notes: list[str] = []
        self.failure = self.culprit = ""
        self.wrong: list[Refused] = []

    def static(self, parities: tuple[Parity, ...], ranges: Ranges | None = None) -> GraphCheck:
        """The verdict of the rules."""
        return self._result("static", locate.static(self.graph), parities, ranges)

    def run(self, stacks: dict[str, GpuStack]) -> GraphCheck:
        """The verdict of the delegate on `stacks` (by precision), parity and calibration."""
        with scratch_folder("pocketfusion-check") as folder:
            path, signature = self._alone(folder)
            ranges = self._calibrate(path, signature)
            if not stacks:
                return self.static((), ranges)
            parities: list[Parity] = []
            refused: list[Refused] = []
            for precision, stack in stacks.items():
                with Oracle(stack, threads=self.threads, timeout=self.timeout) as oracle:
                    verdict, found = self._compare(oracle, path, signature, precision)
                    if found is not None:
                        parities.append(found)
                    if not verdict.accepted:
                        refused = self._explain(oracle, verdict, precision)
                        break
        state = "refused" if refused else "failed" if self.failure else "gpu"
        return self._result(state, refused or self.wrong, tuple(parities), ranges)

    def _result(
        self, verdict: str, refused: list[Refused], parities: tuple[Parity, ...], ranges: Ranges | None
    ) -> GraphCheck:
        return GraphCheck(
            self.name,
            self.graph.name,
            len(self.graph.operations),
            verdict,
            tuple(refused),
            self.failure,
            self.culprit,
            parities,
            ranges,
            self.source,
            tuple(self.notes),
            self.precision,
        )

    def _alone(self, folder: Path) -> tuple[Path, str]:
        """A file with this graph only, and its signature's name; the inputs get that file's names."""
        if len(self.file.graphs) == 1:
            return self.file.path, self.graph.name
        path = folder / "graph.tflite"
        reads, _ = extract(self.file, self.graph, [op.index for op in self.graph.operations], path)
        names = {tensor.index: name for name, tensor in self.graph.inputs.items()}
        self.inputs = [{key(t): one[names[t.index]] for t in reads} for one in self.inputs]
        return path, SIGNATURE

    def _calibrate(self, path: Path, signature: str) -> Ranges | None:
        needed, free = activation_bytes(self.graph), _free_memory()
        if free is not None and needed > 0.7 * free:
            self.notes.append(f"not calibrated: its activations take {needed / 1e9:.1f} GB, free are {free / 1e9:.1f}")
            return None
        self.progress("calibrating on the CPU")
        return calibrate(path, self.graph, signature, self.inputs, self.threads)

    def _compare(self, oracle: Oracle, path: Path, signature: str, precision: str) -> tuple[Verdict, Parity | None]:
        self.progress(f"compiling in {precision} on {oracle.stack.name}")
        verdict = oracle.compile(path, precision)
        if not verdict.accepted:
            return verdict, None
        if wide := [name for name, tensor in self.graph.inputs.items() if tensor.dtype == "int64"]:
            self.notes.append(f"not run: LiteRT's Python buffers take no int64 ({', '.join(wide)})")
            return verdict, None
        self.progress(f"comparing with the CPU in {precision}")
        reference, pairs = oracle.folder / "float.tflite", []
        if not float_weights(self.file, reference):
            reference = path
        elif not self.notes:
            self.notes.append("compared with the CPU computing in float, as the GPU does, on the dequantised weights")
        for inputs in self.inputs[:: max(1, len(self.inputs) - 1)][:COMPARED]:
            verdict, measured = oracle.run(path, inputs, precision, signature)
            expected = oracle.reference(reference, inputs, signature)
            if measured is None:
                return verdict, None
            if expected.outputs is None:
                self.notes.append(f"not compared: the CPU cannot run it ({expected.error[:120]})")
                return verdict, None
            pairs.append((expected.outputs, measured))
        found = parity(precision, oracle.stack.name, pairs)
        if not found.right and precision in ("fp32", self.precision):
            probe = bisect.number_probe(oracle, *self._in_float(reference), precision, self._named())
            self.progress("looking for the operations at fault")
            self.wrong = [one for one in locate.wrong(self.graph) if probe(one.index, one.index + 1)]
            if not self.wrong:
                self._bisect(probe)
        return verdict, found

    def _in_float(self, reference: Path) -> tuple[File, Graph]:
        """File and graph whose parts a CPU computes without rounding activations, operation by operation the same."""
        if reference == self.file.path or len(self.file.graphs) > 1:
            return self.file, self.graph
        file = load(reference)
        (graph,) = file.graphs
        same = [op.kind for op in graph.operations] == [op.kind for op in self.graph.operations]
        return (file, graph) if same else (self.file, self.graph)

    def _named(self) -> dict[str, Any]:
        """The first inputs by the graph's own names."""
        by_key = {key(tensor): name for name, tensor in self.graph.inputs.items()}
        return {by_key.get(name, name): values for name, values in self.inputs[0].items()}

    def _explain(self, oracle: Oracle, verdict: Verdict, precision: str) -> list[Refused]:
        self.progress("asking about single operations")
        refused = locate.locate(oracle, self.file, self.graph, verdict, precision)
        if not refused:
            self.failure = verdict.failure or "; ".join(f"{kind}: {why}" for kind, why in verdict.refused.items())
            self.progress("looking for the operations at fault")
            self._bisect(bisect.compile_probe(oracle, self.file, self.graph, precision))
        return refused + locate.wrong(self.graph)

    def _bisect(self, probe: bisect.Probe) -> None:
        if (found := bisect.bisect(self.graph, probe)) is not None:
            first, last = found.operations[0], found.operations[-1]
            kinds = ", ".join(dict.fromkeys(op.kind for op in found.operations[:6]))
            where = " of " + module if (module := locate.module(self.graph, last)) else ""
            run = f"operation {first.index}" if first is last else f"operations {first.index} to {last.index}"
            self.culprit = f"{run} ({kinds}){where}: {found.failure}"


def _free_memory() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
