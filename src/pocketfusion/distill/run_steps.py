"""Runs step distillation: one pair of step counts (direct), or successive halvings (progressive)."""

from __future__ import annotations

from pathlib import Path

from diffusers import DDIMScheduler

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.distill.compatible import check_teacher
from pocketfusion.distill.ddim import step_ratio
from pocketfusion.distill.steps import StepTask, targets_depend_on
from pocketfusion.distill.targets import TargetCache
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, folder_hash
from pocketfusion.models.guidance import guidance_of
from pocketfusion.models.sampling import Sampling, read_sampling
from pocketfusion.recipe import Recipe, StepDistillSettings
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result
from pocketfusion.train.start import Start, identity, open_start, train_on


def sampling_of(start: Start, steps: int, guidance_scale: float) -> Sampling:
    """How a folder is sampled at `steps` steps: its own guidance, or what its UNet asks for."""
    stated = read_sampling(start.folder)
    guidance = guidance_of(start.unet, stated.guidance if stated else None)
    if guidance == "folded" and stated is not None:
        guidance_scale = stated.guidance_scale
    known = stated.guidance_range if stated else None
    return Sampling(num_inference_steps=steps, guidance_scale=guidance_scale, guidance=guidance, guidance_range=known)


def distill_steps(
    recipe: Recipe,
    settings: StepDistillSettings,
    data: CaptionedImages,
    folder: Path,
    teacher: Path,
    stage: StageRun,
    cache: Path | None = None,
    targets: Path | None = None,
) -> Provenance:
    """Trains `folder`'s UNet to do in `settings.steps` what `teacher` does in `settings.teacher_steps`.

    `teacher` is the base (SnapFusion's SD teacher), the folder itself (self-teacher), or a distilled folder (the
    CFG-distilled teacher of the paper's last run). `targets`: a folder where runs share the teacher's targets.
    Raises PocketfusionError as `train`, `open_start` and `check_teacher` do, if the steps do not divide, or if one is
    an ε-model.
    """
    step_ratio(settings.teacher_steps, settings.steps)
    predicts = recipe.teacher.scheduler.get("prediction_type", "epsilon")
    if predicts != "v_prediction":
        raise PocketfusionError(f"the recipe {recipe.name} is of a model that predicts {predicts}: run to-v first")
    low, high = settings.guidance_range
    if not 1 <= low <= high:
        raise PocketfusionError(
            f"the guidance range {low:g},{high:g} is none: give two rising numbers from 1, as 2,14"
        )
    parents = {"student": folder_hash(folder), "teacher": folder_hash(teacher)}
    made_by = identity("distill-steps", settings.model_dump(mode="json"), recipe, data, parents)
    if (finished := finished_result(stage, made_by)) is not None:
        return finished
    check_teacher(folder, teacher)
    student, taught_by = open_start(folder, recipe), open_start(teacher, recipe)
    scale = recipe.teacher.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    sampling = sampling_of(student, settings.steps, scale)
    guided_by = sampling_of(taught_by, settings.teacher_steps, scale)
    if "folded" in (sampling.guidance, guided_by.guidance) and settings.guidance_probability:
        raise PocketfusionError(
            "a folder with folded guidance knows one scale, so it cannot be distilled over a range: set "
            f"guidance_probability {settings.guidance_probability:g} to 0"
        )
    if settings.guidance_normalised and sampling.guidance != "classifier-free":
        raise PocketfusionError(
            f"{folder} has {sampling.guidance} guidance, whose errors no scale multiplies: set guidance_normalised "
            "to false"
        )
    shared = None
    if targets is not None:
        table = DDIMScheduler(**recipe.teacher.scheduler).config.num_train_timesteps
        depends = {"teacher": parents["teacher"], "data": made_by["data"], "seed": settings.train.seed}
        depends |= {
            "draws": "by sample",
            "batch": settings.train.batch_size,
            "settings": targets_depend_on(settings, table),
        }
        depends |= {key: made_by["settings"][key] for key in ("data", "text", "objective")}
        shared = TargetCache(targets, {"of": depends})
    task = StepTask(recipe, settings, data, student, taught_by.unet, (guided_by, sampling), shared)
    return train_on(stage, task, settings.train, made_by, student, cache, sampling, task.scheduler)


def distill_progressively(
    recipe: Recipe,
    settings: StepDistillSettings,
    data: CaptionedImages,
    folder: Path,
    teacher: Path,
    stage: StageRun,
    cache: Path | None = None,
    targets: Path | None = None,
) -> Provenance:
    """`distill_steps` by successive halvings (Salimans & Ho), each with `settings.train`, the last in `stage.out`.

    64 → 8 is 64 → 32, 32 → 16, 16 → 8: every student starts from the one before and is taught by it, the first by
    `teacher`. Intermediate folders lie in the run folder. Raises PocketfusionError if the ratio is no power of two.
    """
    ratio = step_ratio(settings.teacher_steps, settings.steps)
    if ratio & (ratio - 1):
        raise PocketfusionError(
            f"{settings.teacher_steps} steps cannot be halved down to {settings.steps}: give a power of two times "
            f"{settings.steps}, such as {2 * settings.steps}"
        )
    made: Provenance | None = None
    steps = settings.teacher_steps
    while steps > settings.steps:
        steps //= 2
        last = steps == settings.steps
        part = settings.model_copy(update={"steps": steps, "teacher_steps": 2 * steps})
        place = stage
        if not last:
            stage.run.mkdir(parents=True, exist_ok=True)
            place = StageRun.at(stage.run / f"steps-{steps}", None, stage.max_minutes, overwrite=stage.overwrite)
        made = distill_steps(recipe, part, data, folder, teacher, place, cache, targets)
        if not made.finished:
            return made
        folder = teacher = place.out
    assert made is not None
    return made
