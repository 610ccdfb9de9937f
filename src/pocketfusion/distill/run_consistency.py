"""Runs consistency distillation: which guidance the student gets, what is refused, what is only worth a word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffusers import DDIMScheduler

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.distill.compatible import check_teacher
from pocketfusion.distill.consistency import ConsistencyTask
from pocketfusion.distill.ddim import step_ratio
from pocketfusion.distill.guidance import with_guidance_input
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, folder_hash
from pocketfusion.models.guidance import guidance_of
from pocketfusion.models.sampling import Guidance, Sampling, read_sampling
from pocketfusion.recipe import ConsistencySettings, Recipe
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result
from pocketfusion.train.start import Start, identity, open_start, train_on
from pocketfusion.train.teacher import fast_attention


def student_sampling(
    recipe: Recipe, settings: ConsistencySettings, own: Guidance, stated: Sampling | None, taught: Sampling | None
) -> Sampling:
    """How the result is drawn; `own` and `stated`: the student's guidance and sampling.json, `taught`: the teacher's.

    Raises PocketfusionError if the student cannot have that guidance.
    """
    guidance = settings.guidance or ("folded" if own == "classifier-free" else own)
    if own not in ("classifier-free", guidance):
        raise PocketfusionError(
            f"the student has {own} guidance and cannot get {guidance} guidance: begin from a folder with "
            "classifier-free guidance"
        )
    folded = [given for given in (stated, taught) if given and given.guidance == "folded"]
    scale = settings.guidance_scale
    if scale is None:
        known = [given.guidance_scale for given in (*folded, stated) if given]
        scale = known[0] if known else recipe.teacher.guidance_scale
    if guidance == "folded":
        return Sampling(num_inference_steps=settings.steps, guidance_scale=scale, guidance=guidance)
    low, high = settings.guidance_range
    return Sampling(
        num_inference_steps=settings.steps,
        guidance_scale=min(max(scale, low), high),
        guidance=guidance,
        guidance_range=settings.guidance_range if guidance == "embedded" else None,
    )


def check_scales(settings: ConsistencySettings, sampling: Sampling, teacher: Path, stated: Sampling | None) -> None:
    """Raises PocketfusionError if the teacher cannot be guided at a scale that the student is to learn."""
    folded = sampling.guidance == "folded"
    low, high = (sampling.guidance_scale, sampling.guidance_scale) if folded else settings.guidance_range
    if stated is None or stated.guidance == "classifier-free":
        return
    if stated.guidance == "folded":
        knows = (stated.guidance_scale, stated.guidance_scale)
    elif stated.guidance_range is not None:
        knows = stated.guidance_range
    else:
        return
    if not knows[0] <= low <= high <= knows[1]:
        asked = f"{low:g}" if folded else f"{low:g} to {high:g}"
        knowledge = f"{knows[0]:g}" if knows[0] == knows[1] else f"{knows[0]:g} to {knows[1]:g}"
        raise PocketfusionError(
            f"{teacher} knows the guidance {knowledge}, not {asked}: choose what it knows or a teacher with "
            "classifier-free guidance"
        )


def cautions(settings: ConsistencySettings, folder: Path, teacher: Path) -> list[str]:
    """What is allowed but probably not meant, a sentence each."""
    found: list[str] = []
    student, taught = read_sampling(folder), read_sampling(teacher)
    if student and student.num_inference_steps <= settings.steps:
        found.append(
            f"{folder} is drawn in {student.num_inference_steps} steps already: {settings.steps} are no fewer"
        )
    if taught and taught.num_inference_steps != settings.teacher_steps:
        found.append(
            f"{teacher} is drawn in {taught.num_inference_steps} steps, not {settings.teacher_steps}: if steps were "
            f"distilled into it, give --teacher-steps {taught.num_inference_steps}"
        )
    return found


def distill_consistency(
    recipe: Recipe,
    settings: ConsistencySettings,
    data: CaptionedImages,
    folder: Path,
    teacher: Path,
    stage: StageRun,
    cache: Path | None = None,
) -> Provenance:
    """Trains `folder`'s UNet to draw in `settings.steps` what `teacher` draws in `settings.teacher_steps`.

    Raises PocketfusionError as `train`, `open_start` and `check_teacher` do, if the steps do not divide, if the two
    are ε-models, or if student or teacher cannot be guided as asked.
    """
    step_ratio(settings.teacher_steps, settings.steps)
    check_teacher(folder, teacher)
    predicts = DDIMScheduler(**recipe.teacher.scheduler).config.prediction_type
    if predicts != "v_prediction":
        raise PocketfusionError(
            f"the recipe {recipe.name} is of a model with prediction_type {predicts!r}, which few steps cannot use: "
            "convert it with `pocketfusion to-v` first"
        )
    student, guide = open_start(folder, recipe), open_start(teacher, recipe)
    stated, taught = read_sampling(folder), read_sampling(teacher)
    own, teacher_guidance = (_guidance(start, given) for start, given in ((student, stated), (guide, taught)))
    sampling = student_sampling(recipe, settings, own, stated, taught)
    check_scales(settings, sampling, teacher, taught)
    made_by = identity(
        "distill-consistency",
        settings.model_dump(mode="json") | {"sampling": sampling.model_dump(mode="json")},
        recipe,
        data,
        {"student": folder_hash(folder), "teacher": folder_hash(teacher)},
    )
    if (finished := finished_result(stage, made_by)) is not None:
        return finished
    if sampling.guidance == "embedded" and own != "embedded":
        student = replace(student, unet=with_guidance_input(student.unet, settings.embedding_dim))
        fast_attention(student.unet, student.device)
    task = ConsistencyTask(recipe, settings, data, student, guide.unet, sampling, teacher_guidance)
    return train_on(stage, task, settings.train, made_by, student, cache, sampling, task.scheduler)


def _guidance(start: Start, stated: Sampling | None) -> Guidance:
    return guidance_of(start.unet, stated.guidance if stated else None)
