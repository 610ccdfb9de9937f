"""`distill-guidance`: guidance at the price of one network call a step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
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
    report,
)
from pocketfusion.errors import PocketfusionError


@app.command("distill-guidance")
def distill_guidance_command(
    folder: FolderArg,
    recipe: RecipeOpt,
    data: DataOpt,
    out: OutOpt,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Model folder to learn from.", show_default="FOLDER itself")
    ] = None,
    fixed: Annotated[
        float | None, typer.Option("--fixed", metavar="W", help="Fold this one guidance scale in.")
    ] = None,
    guidance_range: Annotated[
        str | None,
        typer.Option("--guidance-range", metavar="LOW,HIGH", help="Scales to learn.", show_default="the recipe's"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            help="Train on the timesteps of sampling in N steps.",
            show_default="what the teacher's sampling.json says, else all timesteps",
        ),
    ] = None,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    cache: CacheOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Distil classifier-free guidance into the UNet: one call a step, the scale an input of it or folded in."""
    scales = parse_range(guidance_range)
    if fixed is not None and scales is not None:
        raise PocketfusionError("--fixed folds in one scale and --guidance-range learns many: give one of them")
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with)
    from pocketfusion.distill.guidance import distill_guidance

    folder, teacher = model_folder(folder), teacher and model_folder(teacher)
    report(distill_guidance(loaded, images, folder, stage, teacher, fixed, scales, steps, cache), out)


def parse_range(text: str | None) -> tuple[float, float] | None:
    """`1,14` as two numbers; raises PocketfusionError if it is anything else."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise PocketfusionError(f"--guidance-range is '{text}': give two numbers, such as 1,14") from None
    return low, high
