"""`to-v`, `distill-steps`, `distill-consistency`, `distill-guidance`, `distill-decoder`: fewer steps and calls."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder
from pocketfusion.cli.shared_options import (
    CacheOpt,
    DataOpt,
    FolderArg,
    LogWithOpt,
    LossJudgeOpt,
    MinutesOpt,
    OutOpt,
    OverwriteOpt,
    PicturesOpt,
    RecipeOpt,
    RunOpt,
    SkipBadOpt,
    TeacherOpt,
    TrainStepsOpt,
)
from pocketfusion.cli.train_commands import begin, replaced, report
from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console

StudentArg = Annotated[Path, typer.Argument(help="Model folder to train on from: the student.", show_default=False)]


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
    folder: StudentArg,
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
    folder: StudentArg,
    teacher: TeacherOpt,
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
    train_steps: TrainStepsOpt = None,
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
    from pocketfusion.distill.steps import distill_progressively, distill_steps
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


class Mode(str, Enum):
    """What guidance costs the result."""

    classifier_free = "classifier-free"
    embedded = "embedded"
    folded = "folded"


@app.command("distill-consistency")
def distill_consistency_command(
    folder: FolderArg,
    teacher: TeacherOpt,
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
    train_steps: TrainStepsOpt = None,
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
    from pocketfusion.distill.consistency import cautions, distill_consistency

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


class Preset(str, Enum):
    """Shapes of the student."""

    half = "half"
    tiny = "tiny"


@app.command("distill-decoder")
def distill_decoder_command(
    folder: Annotated[Path, typer.Argument(help="Model folder whose decoder is the teacher.", show_default=False)],
    recipe: RecipeOpt,
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
    scales = parse_range(guidance_range) if guidance_range is not None else None
    if fixed is not None and scales is not None:
        raise PocketfusionError("--fixed folds in one scale and --guidance-range learns many: give one of them")
    loaded, images, stage = begin(recipe, data, out, run, max_minutes, overwrite, skip_bad, log_with)
    from pocketfusion.distill.guidance import distill_guidance

    folder, teacher = model_folder(folder), teacher and model_folder(teacher)
    report(distill_guidance(loaded, images, folder, stage, teacher, fixed, scales, steps, cache), out)
