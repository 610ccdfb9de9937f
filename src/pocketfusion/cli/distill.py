"""`to-v` and `distill-steps`: SnapFusion's step distillation."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.cli.train import (
    CacheOpt,
    DataOpt,
    LogWithOpt,
    MinutesOpt,
    OutOpt,
    OverwriteOpt,
    RunOpt,
    SkipBadOpt,
    begin,
    replaced,
    report,
)
from pocketfusion.errors import PocketfusionError

FolderArg = Annotated[Path, typer.Argument(help="Model folder to train on from: the student.", show_default=False)]
RecipeOpt = Annotated[Path, typer.Option("--recipe", help="Recipe of that model.", show_default=False)]


class Schedule(str, Enum):
    """How the steps are taken away."""

    direct = "direct"
    progressive = "progressive"


def parse_range(text: str) -> tuple[float, float]:
    """Reads `2,14`; raises PocketfusionError unless it is two numbers."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise PocketfusionError(f"--guidance-range {text!r} is no range: give two numbers as 2,14") from None
    return low, high


@app.command("to-v")
def to_v_command(
    folder: FolderArg,
    recipe: Annotated[Path, typer.Option("--recipe", help="Recipe of the v-model.", show_default=False)],
    data: DataOpt,
    out: OutOpt,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    cache: CacheOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Fine-tune an ε-prediction model to v-prediction, which few steps need."""
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with)
    from pocketfusion.distill.to_v import to_v
    from pocketfusion.folder import check_folder

    check_folder(folder := model_folder(folder))
    report(to_v(loaded, images, folder, stage, cache), out)


@app.command("distill-steps")
def distill_steps_command(
    folder: FolderArg,
    teacher: Annotated[Path, typer.Option("--teacher", help="Model folder to learn from.", show_default=False)],
    recipe: RecipeOpt,
    data: DataOpt,
    out: OutOpt,
    teacher_steps: Annotated[int | None, typer.Option("--teacher-steps", help="Default: the recipe's.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="The student's. Default: the recipe's.")] = None,
    schedule: Annotated[
        Schedule, typer.Option("--schedule", help="At once, or by successive halvings.")
    ] = Schedule.direct,
    probability: Annotated[float | None, typer.Option("--p", help="Share of samples with the CFG-aware loss.")] = None,
    guidance_range: Annotated[str | None, typer.Option("--guidance-range", help="Of that loss, as 2,14.")] = None,
    original_weight: Annotated[float | None, typer.Option("--gamma", help="Weight of the original loss.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="Scale that the result is drawn at.")] = None,
    train_steps: Annotated[int | None, typer.Option("--train-steps", help="Updates. Default: the recipe's.")] = None,
    targets: Annotated[Path | None, typer.Option("--targets", help="Share teacher targets between runs here.")] = None,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    cache: CacheOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Train a student to draw in N steps what its teacher draws in 2N or more (CFG-aware step distillation)."""
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with)
    from pocketfusion.distill.run_steps import distill_progressively, distill_steps
    from pocketfusion.folder import check_folder

    settings = loaded.step_distillation
    if settings is None:
        raise PocketfusionError(f"the recipe {loaded.name} has no section 'step_distillation': add one as emoji64's")
    given: dict[str, Any] = {
        "teacher_steps": teacher_steps,
        "steps": steps,
        "guidance_probability": probability,
        "guidance_range": parse_range(guidance_range) if guidance_range else None,
        "original_weight": original_weight,
        "guidance_scale": guidance,
        "train": replaced(settings.train, {"steps": train_steps}),
    }
    settings = replaced(settings, given)
    folder, teacher = model_folder(folder), model_folder(teacher)
    for each in (folder, teacher):
        check_folder(each)
    run_it = distill_steps if schedule is Schedule.direct else distill_progressively
    report(run_it(loaded, settings, images, folder, teacher, stage, cache, targets), out)
