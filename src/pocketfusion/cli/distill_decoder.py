"""`distill-decoder`: a smaller decoder for a model folder, learned from sampled latents."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.cli.train import (
    CacheOpt,
    LogWithOpt,
    LossJudgeOpt,
    MinutesOpt,
    OutOpt,
    OverwriteOpt,
    PicturesOpt,
    RunOpt,
    SkipBadOpt,
    begin,
    replaced,
    report,
)
from pocketfusion.errors import PocketfusionError


class Preset(str, Enum):
    """Shapes of the student."""

    half = "half"
    tiny = "tiny"


@app.command("distill-decoder")
def distill_decoder_command(
    folder: Annotated[Path, typer.Argument(help="Model folder whose decoder is the teacher.", show_default=False)],
    recipe: Annotated[Path, typer.Option("--recipe", help="Recipe of that model.", show_default=False)],
    data: PicturesOpt,
    out: OutOpt,
    preset: Annotated[
        Preset | None,
        typer.Option("--preset", help="half: every stage at half width; tiny: no attention. Default: recipe"),
    ] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="Share of channels to remove. Default: preset")
    ] = None,
    sampler: Annotated[
        Path | None, typer.Option("--sampler", help="Model folder that draws the latents. Default: FOLDER")
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Latents to draw. Default: recipe")] = None,
    loss_judge: LossJudgeOpt = None,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    cache: CacheOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Distil a smaller decoder from captions: sampled latents, the teacher's pictures as targets (SnapFusion)."""
    if ratio is not None and not 0 < ratio < 1:
        raise PocketfusionError(f"--ratio {ratio:g} is not between 0 and 1: give the share of channels to remove")
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with, pictures=True)
    settings = loaded.decoder
    if settings is None:
        raise PocketfusionError(f"the recipe {loaded.name} has no section 'decoder': see recipes/emoji64.yaml")
    settings = replaced(settings, {"preset": preset and preset.value, "samples": samples})
    from pocketfusion.distill.decoder import distill_decoder

    folder, sampler = model_folder(folder), sampler and model_folder(sampler)
    made = distill_decoder(
        loaded, images, folder, stage, settings, ratio=ratio, sampler=sampler, loss_judge=loss_judge, cache=cache
    )
    report(made, out)
