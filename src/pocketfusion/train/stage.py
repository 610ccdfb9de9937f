"""What every training stage does around the loop: skip when done, run folder, provenance, atomic result."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pocketfusion.artefact import atomic_folder
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, machine, read_provenance, write_provenance
from pocketfusion.recipe import TrainSettings
from pocketfusion.train.loop import Task, TrainResult, train
from pocketfusion.train.place import StageRun


def finished_result(stage: StageRun, identity: dict[str, Any]) -> Provenance | None:
    """The provenance of `stage.out` if it is the finished result of the same inputs, else None.

    Raises PocketfusionError if something else is there, unless it may be overwritten or it is this stage's unfinished
    result.
    """
    if not stage.out.exists():
        return None
    before = read_provenance(stage.out)
    if before is not None and all(getattr(before, name) == value for name, value in identity.items()):
        return before if before.finished else None
    if not stage.overwrite:
        raise PocketfusionError(f"{stage.out} exists and came from other inputs: choose another --out or --overwrite")
    return None


def run_stage(
    stage: StageRun,
    task: Task,
    settings: TrainSettings,
    identity: dict[str, Any],
    write: Callable[[Path, TrainResult], dict[str, Any]],
    samples_before: int = 0,
) -> Provenance:
    """Trains and writes the result folder atomically; `write` fills it and returns the results for its provenance."""
    result = train(task, settings, stage.run, fingerprint=identity, max_minutes=stage.max_minutes)
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
            provenance.results = {**result.figures, **write(partial, result)}
            write_provenance(partial, provenance)
    return provenance
