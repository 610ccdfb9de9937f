"""`distill-consistency`: four, two or one step."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.distill import parse_range
from pocketfusion.cli.elastic import FolderArg, RecipeOpt
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
from pocketfusion.terminal import Console


class Mode(str, Enum):
    """What guidance costs the result."""

    classifier_free = "classifier-free"
    embedded = "embedded"
    folded = "folded"


@app.command("distill-consistency")
def distill_consistency_command(
    folder: FolderArg,
    teacher: Annotated[Path, typer.Option("--teacher", help="Model folder to learn from.", show_default=False)],
    recipe: RecipeOpt,
    data: DataOpt,
    out: OutOpt,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", help="The student's, such as 4, 2 or 1. Default: the recipe's."),
    ] = None,
    teacher_steps: Annotated[
        int | None, typer.Option("--teacher-steps", metavar="M", help="A multiple of N. Default: the recipe's.")
    ] = None,
    fold: Annotated[
        float | None, typer.Option("--fold", metavar="W", help="One call a step: fold this guidance scale in.")
    ] = None,
    mode: Annotated[
        Mode | None,
        typer.Option("--guidance-mode", help="Default: the recipe's, else FOLDER's own, or folded if that costs two."),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", metavar="W", help="Scale that the result is drawn at.")
    ] = None,
    guidance_range: Annotated[
        str | None, typer.Option("--guidance-range", metavar="LOW,HIGH", help="Scales to learn, if not folded.")
    ] = None,
    train_steps: Annotated[int | None, typer.Option("--train-steps", help="Updates. Default: the recipe's.")] = None,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    cache: CacheOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Train a student to draw in 4, 2 or 1 steps (consistency distillation in phases)."""
    scales = parse_range(guidance_range) if guidance_range else None
    if fold is not None and (scales or guidance is not None or mode not in (None, Mode.folded)):
        raise PocketfusionError("--fold folds in one guidance scale: leave out every other guidance option")
    if mode is Mode.folded and scales:
        raise PocketfusionError("a folded guidance is one scale and --guidance-range are many: give one of them")
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with)
    from pocketfusion.distill.run_consistency import cautions, distill_consistency

    settings = loaded.consistency
    if settings is None:
        raise PocketfusionError(f"the recipe {loaded.name} has no section 'consistency': add one as emoji64's")
    if fold is not None:
        mode = Mode.folded
    elif mode is None and scales and settings.guidance in (None, "folded"):
        mode = Mode.embedded  # the way to learn a range with one call
    given: dict[str, Any] = {
        "steps": steps,
        "teacher_steps": teacher_steps,
        "guidance": mode.value if mode else None,
        "guidance_scale": fold if fold is not None else guidance,
        "guidance_range": scales,
        "train": replaced(settings.train, {"steps": train_steps}),
    }
    settings = replaced(settings, given)
    folder, teacher = model_folder(folder), model_folder(teacher)
    notes = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    for sentence in cautions(settings, folder, teacher):
        notes.print(f"note: {sentence}")
    report(distill_consistency(loaded, settings, images, folder, teacher, stage, cache), out)
