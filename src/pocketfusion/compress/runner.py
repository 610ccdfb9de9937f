"""Runs a chain: skips what is finished, goes on with what was begun, and stops where a gate is not met."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketfusion.artefact import check_writable_parent, write_json
from pocketfusion.compress.chain import Chain, Stage, plain
from pocketfusion.compress.page import write_page
from pocketfusion.compress.records import FINISHED, Record, Records, given_hash, new_making, sole
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder
from pocketfusion.terminal import part_of
from pocketfusion.train.place import StageRun

Progress = Callable[[str, int, int], None]


@dataclass
class Display:
    """What is told while the chain runs; a function each, called with the stage and its number from 1."""

    begun: Callable[[Stage, int], None] = lambda stage, number: None
    ended: Callable[[Stage, int, Record, bool], None] = lambda stage, number, record, skipped: None
    progress: Progress = lambda what, done, total: None


@dataclass
class Result:
    """Which stages ran, which were skipped, and the one that time ran out in."""

    ran: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unfinished: str | None = None


@dataclass(frozen=True)
class Span:
    """Which stages may run: from one, until one, or only one; the others before must be finished."""

    first: int
    last: int

    @classmethod
    def of(cls, chain: Chain, start: str | None, until: str | None, only: str | None) -> Span:
        """Raises PocketfusionError for an unknown stage, or an end before the start."""
        names = [stage.name for stage in chain.stages]
        if only is not None and (start or until):
            raise PocketfusionError(f"--only {only} is one stage: leave out --from and --until")
        begin, end = only or start, only or until
        first = names.index(chain[begin].name) if begin else 0
        last = names.index(chain[end].name) if end else len(names) - 1
        if last < first:
            raise PocketfusionError(f"--until {until} comes before --from {start}: give them in the recipe's order")
        return cls(first, last)


def open_out(chain: Chain, out: Path) -> None:
    """Makes the folder, or checks that it is this recipe's; raises PocketfusionError if it is anything else."""
    check_writable_parent(out)
    if out.exists() and not out.is_dir():
        raise PocketfusionError(f"{out} is a file: give a folder for the recipe's results")
    known = _recipe_name(out)
    if known is None and out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise PocketfusionError(f"{out} holds something else: give a new folder, or one that compress made")
    if known not in (None, chain.recipe.name):
        raise PocketfusionError(f"{out} is the recipe {known}'s, not {chain.recipe.name}'s: choose another OUT")


def _check_given(stage: Stage) -> None:
    """Raises PocketfusionError if what a stage is to be taken from is not there, or no model folder."""
    if stage.given is None:
        return
    if not stage.given.exists():
        raise PocketfusionError(f"the stage {stage.name} is to be taken from {stage.given}, where nothing is")
    if stage.is_a.makes == "model":
        check_folder(stage.given)


def _recipe_name(out: Path) -> str | None:
    """Of the recipe that a folder belongs to; None if it is no compress's."""
    try:
        return str(json.loads((out / "compress.json").read_text(encoding="utf-8"))["recipe"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_chain(
    chain: Chain,
    out: Path,
    *,
    span: Span | None = None,
    max_minutes: float | None = None,
    display: Display | None = None,
) -> Result:
    """Makes every stage of `span` (default: all) in `out`, in order, and writes OUT/report.html however it ends.

    Raises PocketfusionError if `out` is another's or in use, an earlier stage is missing, a stage cannot run, or a
    gate is not met.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PocketfusionError("compress runs in one process: do not launch several (a single stage's command may)")
    if max_minutes is not None and not max_minutes > 0:
        raise PocketfusionError(f"--max-minutes {max_minutes} is not above 0: give the minutes to work")
    open_out(chain, out)
    for stage in chain.stages:
        _check_given(stage)
    span = span or Span(0, len(chain.stages) - 1)
    if not out.exists():  # nothing is finished there, and nothing is to be left there
        for stage in chain.stages[span.first : span.last + 1]:
            for name in stage.parents:
                if chain.stages.index(chain[name]) < span.first and chain[name].given is None:
                    raise _missing(stage, name)
    out.mkdir(exist_ok=True)
    with sole(out):
        write_json(out / "compress.json", {"recipe": chain.recipe.model_dump(mode="json")})
        try:
            return _Run(chain, out, display or Display(), max_minutes).run(span)
        finally:
            write_page(chain, out)


def planned(chain: Chain, records: Records) -> Iterator[tuple[Stage, str]]:
    """What a run would do with each stage: `skip`, `go on`, `run`, or `given`; nothing is changed but glances."""
    kept: dict[str, str] = {}
    for stage in chain.stages:
        if stage.given is not None:
            kept[stage.name] = given_hash(records, stage.name, stage.given)
            yield stage, "given"
            continue
        record = records.get(stage.name)
        known = all(name in kept for name in stage.parents)
        if record is None or not known or record.key != _key_of(chain, stage, kept):
            yield stage, "run"
        elif records.finished(stage.name, record) and not _to_train_on(stage, record):
            kept[stage.name] = record.sha256
            yield stage, "skip"
        else:
            yield stage, "go on"


def _key_of(chain: Chain, stage: Stage, hashes: dict[str, str]) -> dict[str, Any]:
    """All that a stage's result depends on: of the recipe, and what its inputs hold."""
    seen = {name: getattr(chain[name].options, "skip_bad", False) for name in stage.parents}
    parents = {name: f"{hashes[name]}{' without bad ones' if seen[name] else ''}" for name in stage.parents}
    return {**chain.depends_on(stage), "parents": parents}


def _to_train_on(stage: Stage, record: Record) -> bool:
    """Whether a finished stage falls short of its gate and may still train."""
    if stage.gate is None or stage.train is None or stage.gate.up_to is None:
        return False
    done = record.scores.get("steps", stage.train.steps)
    return not stage.gate.goal(stage.train.steps).met(record.scores) and done < stage.gate.up_to


class _Run:
    def __init__(self, chain: Chain, out: Path, display: Display, max_minutes: float | None):
        self.chain, self.out, self.display = chain, out, display
        self.records, self.result = Records(out), Result()
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        self.hashes: dict[str, str] = {}
        self.made: dict[str, str] = {}

    def run(self, span: Span) -> Result:
        for number, stage in enumerate(self.chain.stages[: span.last + 1]):
            if stage.given is not None:
                self.hashes[stage.name] = given_hash(self.records, stage.name, stage.given)
                self.made[stage.name] = self.hashes[stage.name]
            elif number >= span.first:
                if not self._stage(stage, number + 1):
                    self.result.unfinished = stage.name
                    break
            else:
                self._earlier(stage, self.chain.stages[span.first])
        return self.result

    def _earlier(self, stage: Stage, first: Stage) -> None:
        """A stage before those that may run: known if it is finished, and else only missed by who needs it."""
        record = self.records.get(stage.name)
        known = all(name in self.hashes for name in stage.parents)
        if record and known and record.key == _key_of(self.chain, stage, self.hashes) and self._is_done(stage, record):
            self._keep(stage, record)

    def _is_done(self, stage: Stage, record: Record) -> bool:
        return self.records.finished(stage.name, record) and not _to_train_on(stage, record)

    def _keep(self, stage: Stage, record: Record) -> None:
        self.hashes[stage.name], self.made[stage.name] = record.sha256, record.made

    def _stage(self, stage: Stage, number: int) -> bool:
        """Makes one stage; False if time ran out. Raises PocketfusionError if its gate is not met."""
        for name in stage.parents:
            if name not in self.hashes:
                raise _missing(stage, name)
        key = _key_of(self.chain, stage, self.hashes)
        record = self.records.begin(stage.name, key, {name: self.made[name] for name in stage.parents})
        skipped = self._is_done(stage, record)
        if not skipped:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                return False
            self.display.begun(stage, number)
            record = self._make(stage, number, record)
            if record.state != FINISHED:
                return False
        (self.result.skipped if skipped else self.result.ran).append(stage.name)
        self._judge(stage, record)
        self._keep(stage, record)
        self.display.ended(stage, number, record, skipped)
        if record.gate_met is False:
            raise PocketfusionError(_short(stage, record))
        return True

    def _make(self, stage: Stage, number: int, record: Record) -> Record:
        from pocketfusion.compress.calls import CALLS, Work

        left = None if self.deadline is None else (self.deadline - time.monotonic()) / 60
        goal = stage.gate.goal(stage.train.steps) if stage.gate is not None and stage.train is not None else None
        place = self.records.place(stage.name)
        work = Work(
            recipe=self.chain.recipe_of(stage),
            options=stage.options,
            inputs={role: tuple(map(self._path, names)) for role, names in stage.inputs.items()},
            place=StageRun(place, place.with_name(f"{stage.name}.run"), left, goal=goal),
            cache=self.out / "_cache",
            skip_bad=any(getattr(self.chain[name].options, "skip_bad", False) for name in stage.parents),
            progress=self._telling(stage),
        )
        if record.state == FINISHED:  # to train on: what it holds will change
            record.state, record.made = "begun", new_making()
            self.records.put(stage.name, record)
        began = time.monotonic()
        with part_of(f"{number}/{len(self.chain.stages)} {stage.name}"), _as_alone():
            made = CALLS[stage.kind](work)
        # a kill loses what this process has counted, not what the run's log has
        record.seconds = round(max(record.seconds + time.monotonic() - began, made.seconds), 1)
        record.samples, record.scores = made.samples, made.scores
        if made.finished:
            self.records.finish(stage.name, record)
        else:
            self.records.put(stage.name, record)
        return record

    def _telling(self, stage: Stage) -> Progress:
        """Shows the stage's progress here and, once a second, leaves it for `--status`."""
        since, told = time.time(), float("-inf")
        self.records.tell(stage.name, since)

        def tell(what: str, done: int, total: int) -> None:
            nonlocal told
            self.display.progress(what, done, total)
            if time.monotonic() >= told + 1:
                self.records.tell(stage.name, since, what, done, total)
                told = time.monotonic()

        return tell

    def _path(self, system: str) -> str:
        """Where a stage's result is, with the steps that were asked of it."""
        stage = self.chain[plain(system)]
        return f"{stage.given or self.records.place(stage.name)}{system[len(stage.name) :]}"

    def _judge(self, stage: Stage, record: Record) -> None:
        met = None if stage.gate is None else stage.gate.goal(0).met(record.scores)
        text = stage.gate.text if stage.gate else ""
        if (record.gate, record.gate_met) != (text, met):
            record.gate, record.gate_met = text, met
            self.records.put(stage.name, record)


def _missing(stage: Stage, parent: str) -> PocketfusionError:
    return PocketfusionError(
        f"the stage {stage.name} needs {parent}, which is not finished with these settings: run without --from and "
        f"--only, or --from {parent}"
    )


@contextmanager
def _as_alone() -> Iterator[None]:
    """A stage finds what it would in a process of its own, and leaves no threads or random numbers to the next."""
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _short(stage: Stage, record: Record) -> str:
    """Why the chain stops at a stage's gate."""
    assert stage.gate is not None
    bounds = {**stage.gate.least, **stage.gate.most}
    reached = ", ".join(f"{name} {record.scores.get(name, float('nan')):.4g}" for name in bounds)
    steps = f" after {record.scores.get('steps', stage.train.steps):,.0f} steps" if stage.train else ""
    cure = "raise its up_to or lower its gate" if stage.train else "change an earlier stage or lower its gate"
    return f"the stage {stage.name} does not reach its gate {stage.gate.text}: it has {reached}{steps}; {cure}"
