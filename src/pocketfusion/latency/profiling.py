"""Measures a latency table: every part, and the whole base network, timed in turns.

A round runs every network once, the base's parts in the order in which they run in it, so that each finds the caches
as its neighbours leave them and all share the machine's moods. Timed by the median of the calmer rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from pocketfusion.latency.part_modules import Empty, meta_unet, part_module, part_samples, unet_module, unet_samples
from pocketfusion.latency.table import Entry, LatencyTable, Overhead, Timing, Whole
from pocketfusion.latency.target import Target
from pocketfusion.latency.timing_backends import Backend, Job, Runner
from pocketfusion.latency.unet_parts import Part, action_architectures, bare, base_shapes, list_parts, unknown_part
from pocketfusion.mobile.pipeline_specs import multiply_adds
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.runtime.memory import available_memory, release_garbage

#: Called with what is being done, how much of it is done and how much there is.
Progress = Callable[[str, int, int], None]
K = TypeVar("K", bound=Hashable)
WARMUP = 3  #: rounds that are not counted
WHOLE, BARE, EMPTY = "unet", "unet: bare", "empty"
#: A loaded file and its packed weights, in units of the file's size.
_RESIDENT = 2.2


def quiet_progress(stage: str, done: int, total: int) -> None:
    """Says nothing."""


def rounds(
    runners: Mapping[K, Runner], runs: int, progress: Progress = quiet_progress, stage: str = "timing"
) -> dict[K, Timing]:
    """Runs all `runners` in turns, in their order: `WARMUP` rounds, then twice `runs`; the calmer half counts.

    Other work on the machine slows whole stretches of rounds, and short networks on several threads more than long
    ones, so that a sum of parts would no longer be comparable with a whole.
    """
    total = WARMUP + 2 * runs
    seconds: dict[K, list[float]] = {key: [] for key in runners}
    for number in range(total):
        progress(stage, number, total)
        for key, run in runners.items():
            start = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - start)
    progress(stage, total, total)
    lengths = [sum(values) for values in zip(*seconds.values(), strict=True)]
    calm = sorted(range(WARMUP, total), key=lengths.__getitem__)[:runs]
    return {key: _timing([values[i] for i in calm]) for key, values in seconds.items()}


def _timing(seconds: Sequence[float]) -> Timing:
    ms = [1000 * value for value in seconds]
    return Timing(median=round(median(ms), 4), min=round(min(ms), 4), max=round(max(ms), 4), runs=len(ms))


def distinct_parts(
    config: Mapping[str, Any], architectures: Sequence[Architecture], text_length: int
) -> dict[str, tuple[Part, Architecture]]:
    """The first part of each key, with an architecture that has it; the first architecture's parts come first."""
    found: dict[str, tuple[Part, Architecture]] = {}
    for architecture in architectures:
        for part in list_parts(config, architecture, text_length):
            found.setdefault(part.key, (part, architecture))
    return found


class PartJobs:
    """The parts of a base as networks to time, with their parameters and multiply-adds."""

    def __init__(self, target: Target, *, base_only: bool):
        self.target = target
        architectures = action_architectures(target.config)
        # a pruned network has parts of its own
        architectures = architectures[:2] if base_only else [*architectures, target.architecture]
        self.parts = distinct_parts(target.config, architectures, target.text_length)
        self._unets: dict[int, nn.Module] = {}

    def module(self, key: str) -> nn.Module:
        """The part on `meta`."""
        part, architecture = self.parts[key]
        if id(architecture) not in self._unets:
            self._unets[id(architecture)] = meta_unet(self.target.config, architecture)
        return part_module(self._unets[id(architecture)], part)

    def job(self, key: str, batch: int) -> Job:
        """The part at that batch size."""
        samples = part_samples(self.target.config, self.parts[key][0], self.target.text_length, batch)
        return Job(key, lambda: self.module(key), samples)

    def entry(self, key: str, ms: dict[int, Timing]) -> Entry:
        """The part's row."""
        return network_entry(self.parts[key][0].kind, self.module(key), self.job(key, 1), ms)


def whole_job(target: Target, architecture: Architecture, batch: int) -> Job:
    """A whole UNet at that batch size."""
    key = f"{WHOLE}:{base_shapes(target.config)}{architecture.model_dump_json()}"
    samples = unet_samples(target.config, target.text_length, batch)
    return Job(key, lambda: unet_module(target.config, architecture), samples)


def network_entry(kind: str, module: nn.Module, job: Job, ms: dict[int, Timing]) -> Entry:
    """A row: the network's parameters and multiply-adds of one sample, beside its timings."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    samples = {name: value.to(device) for name, value in job.samples.items()}
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return Entry(kind=kind, parameters=parameters, macs=multiply_adds(module, samples), ms=ms)


def measure(
    target: Target,
    backend: Backend,
    *,
    batches: Sequence[int],
    runs: int,
    base_only: bool = False,
    validation: Mapping[str, Architecture] | None = None,
    progress: Progress = quiet_progress,
) -> LatencyTable:
    """Measures the table of `target`.

    `base_only` leaves out the parts that only changed architectures need. The architectures of `validation` are
    measured as wholes in the same rounds at the largest batch size, and compared with their predictions.
    Raises PocketfusionError, before anything is timed, if an architecture of `validation` needs a part left out.
    """
    jobs = PartJobs(target, base_only=base_only)
    base, validation = Architecture.stock(target.config), validation or {}
    for architecture in validation.values():
        for part in list_parts(target.config, architecture, target.text_length):
            if part.key not in jobs.parts:
                raise unknown_part(part)
    ms: dict[str, dict[int, Timing]] = {key: {} for key in jobs.parts}
    overhead, measured = {}, {}
    for batch in batches:
        todo = {WHOLE: whole_job(target, base, batch), BARE: whole_job(target, bare(target.config), batch)}
        if batch == max(batches):
            todo |= {f"{WHOLE}: {name}": whole_job(target, found, batch) for name, found in validation.items()}
        todo |= {key: jobs.job(key, batch) for key in jobs.parts} | {EMPTY: empty_job()}
        times, interleaved = time_jobs(backend, todo, runs, progress, f"batch {batch}")
        for key in jobs.parts:
            ms[key][batch] = times[key]
        measured = {name: times[f"{WHOLE}: {name}"] for name in validation if f"{WHOLE}: {name}" in times}
        overhead[batch] = overhead_of(target.config, target.text_length, times, interleaved=interleaved)
    others, modules = target.networks()
    times = time_jobs(backend, others, runs, progress, "text encoder and decoder")[0]
    table = LatencyTable(
        settings=backend.settings,
        base=base_shapes(target.config),
        text_length=target.text_length,
        parts={key: jobs.entry(key, ms[key]) for key in jobs.parts},
        overhead=overhead,
        networks={name: network_entry(name, modules[name], job, {1: times[name]}) for name, job in others.items()},
    )
    checks = [
        table.compare(target.config, name, validation[name], max(batches), timing) for name, timing in measured.items()
    ]
    return table.model_copy(update={"validation": checks})


def overhead_of(
    config: Mapping[str, Any], text_length: int, times: Mapping[str, Timing], *, interleaved: bool
) -> Overhead:
    """The overhead at one batch size, from the times of `WHOLE`, `BARE`, `EMPTY` and all their parts."""
    ms = {key: timing.median for key, timing in times.items()}
    base, less = (
        Whole.beside(times[key], list_parts(config, architecture, text_length), ms)
        for key, architecture in ((WHOLE, Architecture.stock(config)), (BARE, bare(config)))
    )
    return Overhead.between(base, less, empty=ms[EMPTY], interleaved=interleaved)


def empty_job() -> Job:
    """A graph that does next to nothing."""
    return Job(EMPTY, Empty, {"x": torch.zeros(1, 8)})


def time_jobs(
    backend: Backend, jobs: Mapping[str, Job], runs: int, progress: Progress, stage: str
) -> tuple[dict[str, Timing], bool]:
    """Prepares, loads and times jobs in the same rounds.

    If memory does not hold them all, whole networks are timed apart, one by one, after the others; and it says false.
    """
    size = 0
    for number, job in enumerate(jobs.values()):
        progress(f"{stage}: preparing", number, len(jobs))
        path = backend.prepare(job)
        size += path.stat().st_size if path else 4 * sum(p.numel() for p in job.module().parameters())
    progress(f"{stage}: preparing", len(jobs), len(jobs))
    release_garbage()
    wholes = [key for key in jobs if key.startswith(WHOLE)]
    together = not wholes or _RESIDENT * size < available_memory()
    groups = [list(jobs)] if together else [[k for k in jobs if k not in wholes], *([key] for key in wholes)]
    times: dict[str, Timing] = {}
    for keys in groups:
        runners = {}
        for number, key in enumerate(keys):
            progress(f"{stage}: loading", number, len(keys))
            runners[key] = backend.load(jobs[key])
        progress(f"{stage}: loading", len(keys), len(keys))
        times |= rounds(runners, runs, progress, f"{stage}: timing")
        del runners
        release_garbage()
    return times, together
