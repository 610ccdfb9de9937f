"""What every training stage does around the loop: skip when done, run folder, provenance, atomic result."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketfusion.artefact import atomic_folder, check_writable_parent
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, machine, read_provenance, write_provenance
from pocketfusion.recipe import TrainSettings
from pocketfusion.train.loop import Task, TrainResult, train


@dataclass(frozen=True)
class StageRun:
    """Where a stage writes and how long it may take."""

    out: Path
    run: Path
    max_minutes: float | None = None
    overwrite: bool = False

    @classmethod
    def at(
        cls, out: Path, run: Path | None = None, max_minutes: float | None = None, overwrite: bool = False
    ) -> StageRun:
        """The run folder is `OUT.run` unless given; raises PocketfusionError on a bad limit or an unwritable place."""
        if max_minutes is not None and not max_minutes > 0:
            raise PocketfusionError(f"--max-minutes {max_minutes} is not above 0: give the minutes to train")
        check_writable_parent(out)
        return cls(out, run or out.with_name(f"{out.name}.run"), max_minutes, overwrite)


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
