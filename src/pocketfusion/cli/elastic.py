"""`train-elastic` and `recover`: training on from a model folder, before and after its UNet is evolved."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    report,
)

FolderArg = Annotated[Path, typer.Argument(help="Model folder to train on from.", show_default=False)]
RecipeOpt = Annotated[Path, typer.Option("--recipe", help="Recipe of that model.", show_default=False)]


@app.command("train-elastic")
def train_elastic_command(
    folder: FolderArg,
    recipe: RecipeOpt,
    data: DataOpt,
    out: OutOpt,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    cache: CacheOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Train the UNet with random blocks left out (SnapFusion's robust training), so that it can be evolved."""
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with)
    from pocketfusion.folder import check_folder
    from pocketfusion.train.elastic import train_elastic

    check_folder(folder := model_folder(folder))
    report(train_elastic(loaded, images, folder, stage, cache), out)


@app.command("recover")
def recover_command(
    folder: FolderArg,
    base: Annotated[Path, typer.Option("--base", help="Model folder to learn from.", show_default=False)],
    recipe: RecipeOpt,
    data: DataOpt,
    out: OutOpt,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    cache: CacheOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Train an evolved UNet to follow its base, stage by stage (BK-SDM's feature distillation)."""
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with)
    from pocketfusion.folder import check_folder
    from pocketfusion.train.recovery import recover

    check_folder(folder := model_folder(folder))
    check_folder(base := model_folder(base))
    report(recover(loaded, images, folder, base, stage, cache), out)
