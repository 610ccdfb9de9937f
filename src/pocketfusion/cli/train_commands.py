"""`train-autoencoder`, `train-teacher`, `train-judge`, `train-elastic`, `recover`: a recipe and data to a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder
from pocketfusion.cli.shared_options import (
    CacheOpt,
    DataOpt,
    FolderArg,
    InitOpt,
    LogWithOpt,
    LossJudgeOpt,
    MinutesOpt,
    OutOpt,
    OverwriteOpt,
    PicturesOpt,
    RecipeArg,
    RecipeOpt,
    RunOpt,
    SkipBadOpt,
)
from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pocketfusion.data.packed import CaptionedImages
    from pocketfusion.folder import Provenance
    from pocketfusion.recipe import Recipe
    from pocketfusion.train.place import StageRun

Section = TypeVar("Section", bound="BaseModel")


def begin(
    recipe: Path,
    data: Path,
    out: Path,
    run: Path | None,
    minutes: float | None,
    overwrite: bool,
    skip_bad: bool,
    log_with: list[str] | None,
    *,
    pictures: bool = False,
) -> tuple:
    """The quick checks of every training command: (recipe, pictures, stage).

    A command that needs the `pictures` themselves takes no cache of latents.
    """
    from pocketfusion.cli.shared import COMPRESS, quiet_libraries, require

    require(*COMPRESS)
    from pocketfusion.data.sources import open_dataset, open_training_data
    from pocketfusion.recipe import load_recipe
    from pocketfusion.train.place import StageRun

    loaded: Recipe = shown_in(load_recipe(recipe), log_with)
    check_trackers_of(loaded)
    stage: StageRun = StageRun.at(out, run, minutes, overwrite)
    opener = open_dataset if pictures else open_training_data
    images: CaptionedImages = opener(data, loaded.data.size, skip_bad=skip_bad)
    tell_notes(images)
    quiet_libraries()  # imports them: only after the quick checks
    return loaded, images, stage


def shown_in(recipe: Recipe, trackers: list[str] | None) -> Recipe:
    """The recipe with these trackers, if any are given, in place of every section's `log_with`."""
    changed = {}
    for name, section in recipe if trackers else ():
        if (settings := getattr(section, "train", None)) is not None:
            settings = settings.model_copy(update={"log_with": tuple(trackers or ())})
            changed[name] = section.model_copy(update={"train": settings})
    return recipe.model_copy(update=changed)


def check_trackers_of(recipe: Recipe) -> None:
    """Raises PocketfusionError for a tracker of any section that is none, or not installed."""
    from pocketfusion.train.place import check_trackers

    for _, section in recipe:
        check_trackers(getattr(getattr(section, "train", None), "log_with", ()))


def tell_notes(images: CaptionedImages) -> None:
    """Prints what of the data was left out or not read, once where several processes work."""
    if os.environ.get("RANK", "0") == "0":
        for note in images.notes:
            Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(f"{images.name}: {note}")


def replaced(settings: Section, given: dict[str, Any]) -> Section:
    """A recipe section with the options that were given in place of its own; PocketfusionError if one is not valid."""
    from pydantic import ValidationError

    from pocketfusion.recipe import field_values

    try:
        return type(settings).model_validate(
            field_values(settings) | {name: value for name, value in given.items() if value is not None}
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise PocketfusionError(f"{first['loc'][-1]}: {first['msg']} (got {first['input']!r})") from None


def report(provenance: Provenance, out: Path) -> None:
    """Prints what a stage made, once where several processes work."""
    if os.environ.get("RANK", "0") != "0":
        return
    state = "finished" if provenance.finished else "stopped by --max-minutes; run the same command to go on"
    console = Console(highlight=False)
    console.print(f"{out}: {provenance.samples_seen:,} samples, {provenance.hours:.2f} h, {state}")
    for name, value in provenance.results.items():
        console.print(f"  {name}: {value}")


@app.command("train-autoencoder")
def train_autoencoder_command(
    recipe: RecipeArg,
    data: PicturesOpt,
    out: OutOpt,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    init: InitOpt = None,
    loss_judge: LossJudgeOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Train the autoencoder (SD's AutoencoderKL) on the pictures."""
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with, pictures=True)
    from pocketfusion.train.autoencoder import train_autoencoder

    report(train_autoencoder(loaded, images, stage, init, loss_judge), out)


@app.command("train-teacher")
def train_teacher_command(
    recipe: RecipeArg,
    data: DataOpt,
    out: OutOpt,
    autoencoder: Annotated[
        Path, typer.Option("--autoencoder", help="Trained autoencoder folder.", show_default=False)
    ],
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    init: InitOpt = None,
    cache: CacheOpt = None,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Train the base UNet and write the whole model folder."""
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with)
    from pocketfusion.train.teacher import train_teacher

    report(train_teacher(loaded, images, autoencoder, stage, init, cache), out)


@app.command("train-judge")
def train_judge_command(
    recipe: RecipeArg,
    data: PicturesOpt,
    out: OutOpt,
    run: RunOpt = None,
    max_minutes: MinutesOpt = None,
    for_losses: Annotated[
        bool, typer.Option("--for-losses", help="Train the recipe's loss_judge: features for losses, never scores.")
    ] = False,
    overwrite: OverwriteOpt = False,
    skip_bad: SkipBadOpt = False,
    log_with: LogWithOpt = None,
) -> None:
    """Train the judge: the image-text model that scores pictures."""
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with, pictures=True)
    from pocketfusion.train.judge import train_judge

    report(train_judge(loaded, images, stage, for_losses=for_losses), out)


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
