"""Where a training stage writes and is shown; light, so that what is wrong is told before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pocketfusion.artefact import check_new, check_writable_parent
from pocketfusion.errors import PocketfusionError
from pocketfusion.recipe import nearest

#: accelerate's names, and what brings each of them: its module and its package.
TRACKERS = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "trackio": ("trackio", "trackio"),
    "mlflow": ("mlflow", "mlflow"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "aim": ("aim", "aim"),
    "clearml": ("clearml", "clearml"),
    "dvclive": ("dvclive", "dvclive"),
    "swanlab": ("swanlab", "swanlab"),
}


def check_trackers(names: Iterable[str]) -> None:
    """Raises PocketfusionError for a name that is none, and for a tracker that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise PocketfusionError(f"there is no tracker {name!r}: {nearest(name, list(TRACKERS))}")
        module, package = TRACKERS[name]
        if find_spec(module) is None:
            raise PocketfusionError(f"the tracker {name} is not installed: pip install {package}")


@dataclass(frozen=True)
class Goal:
    """Held-out figures that training has to reach: short of one it goes through its schedule again, up to a limit.

    `least` and `most`: figure → the value that it must not fall below, or not exceed. `up_to`: steps in all, a
    multiple of the schedule's.
    """

    least: Mapping[str, float]
    most: Mapping[str, float]
    up_to: int

    def met(self, figures: Mapping[str, float]) -> bool:
        """Whether all figures are there and good enough; one that is not finite is not."""
        enough = all(figures.get(name, float("nan")) >= value for name, value in self.least.items())
        return enough and all(figures.get(name, float("nan")) <= value for name, value in self.most.items())


@dataclass(frozen=True)
class StageRun:
    """Where a stage writes, how long it may take, and what it has to reach."""

    out: Path
    run: Path
    max_minutes: float | None = None
    overwrite: bool = False
    goal: Goal | None = None

    @classmethod
    def at(
        cls, out: Path, run: Path | None = None, max_minutes: float | None = None, overwrite: bool = False
    ) -> StageRun:
        """The run folder is `OUT.run` unless given; raises PocketfusionError on a bad limit or an unwritable place."""
        if max_minutes is not None and not max_minutes > 0:
            raise PocketfusionError(f"--max-minutes {max_minutes} is not above 0: give the minutes to train")
        check_writable_parent(out)
        if overwrite and out.is_dir():
            check_new(out, overwrite)
        place = run or out.with_name(f"{out.name}.run")
        if place.resolve().is_relative_to(out.resolve()):
            raise PocketfusionError(f"--run {place} lies in --out {out}, which is replaced whole: give another folder")
        return cls(out, place, max_minutes, overwrite)
