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


def is_finished(stage: StageRun, identity: dict[str, Any]) -> bool:
    """Whether `stage.out` is the finished result of the same inputs.

    Raises PocketfusionError if something else is there, unless it may be overwritten or it is this stage's unfinished
    result.
    """
    if not stage.out.exists():
        return False
    before = read_provenance(stage.out)
    same = before is not None and before.stage == identity["stage"] and before.settings == identity["settings"]
    same = same and before is not None and before.parents == identity["parents"] and before.data == identity["data"]
    if same and before is not None:
        return before.finished
    if not stage.overwrite:
        raise PocketfusionError(f"{stage.out} exists and came from other inputs: choose another --out or --overwrite")
    return False


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
