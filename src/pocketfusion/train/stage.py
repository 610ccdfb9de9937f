"""What every training stage does around the loop: skip when done, run folder, provenance, atomic result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, machine, read_provenance, write_provenance
from pocketfusion.locks import hold, release
from pocketfusion.processes import lost_processes_are_told, process_state
from pocketfusion.recipe import TrainSettings
from pocketfusion.train.checkpoint import latest_checkpoint
from pocketfusion.train.loop import Task, TrainResult, train
from pocketfusion.train.place import StageRun


def finished_result(stage: StageRun, identity: dict[str, Any]) -> Provenance | None:
    """The provenance of `stage.out` if it is the finished result of the same inputs, else None.

    A result short of `stage.goal` is not finished while it may train on.
    Raises PocketfusionError if something else is there, unless it may be overwritten or it is this stage's unfinished
    result.
    """
    if not stage.out.exists():
        return None
    before = read_provenance(stage.out)
    if before is not None and _same_inputs(before, identity):
        return before if _is_done(stage, before) else None
    if not stage.overwrite:
        raise PocketfusionError(f"{stage.out} exists and came from other inputs: choose another --out or --overwrite")
    return None


def _same_inputs(provenance: Provenance, identity: dict[str, Any]) -> bool:
    return all(getattr(provenance, name) == value for name, value in identity.items())


def _is_done(stage: StageRun, before: Provenance) -> bool:
    """Whether a result is finished, and at its goal or at the end of what it may train for that."""
    if not before.finished or stage.goal is None or stage.goal.met(before.results):
        return before.finished
    return before.results.get("steps", before.settings["train"]["steps"]) >= stage.goal.up_to


def _steps_in(stage: StageRun, identity: dict[str, Any], batch_size: int, samples_before: int) -> int:
    """Steps that `stage.out` holds, if it is unfinished and its run folder has no checkpoint; else 0."""
    before = read_provenance(stage.out)
    if before is None or _is_done(stage, before) or not _same_inputs(before, identity):
        return 0
    return 0 if latest_checkpoint(stage.run / "checkpoints") else (before.samples_seen - samples_before) // batch_size


def run_stage(
    stage: StageRun,
    task: Task,
    settings: TrainSettings,
    identity: dict[str, Any],
    write: Callable[[Path, TrainResult], dict[str, Any]],
    reopen: Callable[[Path], nn.Module],
    samples_before: int = 0,
) -> Provenance:
    """Trains and writes the result folder atomically; `write` fills it and returns the results for its provenance.

    An unfinished result goes on from its run folder's checkpoint or, where that is lost (another machine), from the
    result's own weights at its own step: `reopen` makes `task.model`'s like of a result folder. AdamW's moments and
    the rounding of the weights are then lost, the schedule and the samples are not.
    """
    hold(stage.run)
    first = _steps_in(stage, identity, settings.batch_size, samples_before)
    if first:
        task.model.load_state_dict(reopen(stage.out).float().state_dict())
    minutes, goal = stage.max_minutes, stage.goal
    result = train(task, settings, stage.run, fingerprint=identity, max_minutes=minutes, first_step=first, goal=goal)
    provenance = Provenance(
        **identity,
        seed=settings.seed,
        samples_seen=samples_before + result.samples,
        hours=round(result.seconds / 3600, 3),
        machine=machine(),
        finished=result.finished,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        with atomic_folder(stage.out, overwrite=True) as partial:
            skipped = {"skipped_steps": result.skipped} if result.skipped else {}
            provenance.results = {**result.figures, **skipped, **write(partial, result)}
            if result.steps > settings.steps:  # trained on for a goal: more than its settings say
                provenance.results["steps"] = result.steps
            write_provenance(partial, provenance)
    with lost_processes_are_told("and the result is written again"):
        process_state().wait_for_everyone()  # the next stage reads what the first process has written
    release(stage.run)
    return provenance
