"""`distill-steps`: CFG-aware step distillation (SnapFusion, arXiv 2306.00980, section 4 and appendix C).

One pair of step counts is direct distillation; successive halvings are progressive (Salimans & Ho 2022).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import nn

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.distill.compatible import check_teacher
from pocketfusion.distill.ddim import (
    NoiseSchedule,
    Span,
    add_noise,
    check_falling,
    rollout,
    sampler_steps,
    spans,
    step_ratio,
    v_of,
    v_target,
)
from pocketfusion.distill.objectives import (
    TargetCache,
    distillation_loss,
    dynamic_scale,
    evenly_shared,
    step_objective,
)
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, folder_hash
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.guided import guidance_of, guided_prediction, guided_predictor, remembered_text
from pocketfusion.models.sampling import Guidance, Sampling, read_sampling
from pocketfusion.processes import mean_over_processes
from pocketfusion.recipe import Recipe, StepDistillSettings
from pocketfusion.train.batch import Batch, shared
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result
from pocketfusion.train.start import Start, identity, open_start, train_on
from pocketfusion.train.teacher import TeacherTask


class Distilled(NamedTuple):
    """A batch on the device: z_t and span of its student steps, caption states, w [B], targets ṽ."""

    z_t: torch.Tensor
    span: Span
    states: torch.Tensor
    scale: torch.Tensor
    target: torch.Tensor


class StepTask(TeacherTask):
    """Student N steps, teacher K N steps: one student step learns to land where K teacher steps do."""

    def __init__(
        self,
        recipe: Recipe,
        settings: StepDistillSettings,
        data: CaptionedImages,
        student: Start,
        teacher: ElasticUNet,
        sampling: tuple[Sampling, Sampling],
        targets: TargetCache | None = None,
    ):
        """`sampling`: the teacher's and the student's. Raises PocketfusionError if the steps do not divide."""
        super().__init__(recipe, data, student.unet, student.vae, student.text, settings.train)
        self.distill, self.teacher, self.targets = settings, teacher.eval().requires_grad_(False), targets
        self.teachers = (self.teacher,)
        # few steps must begin at the last timestep: the result's folder gets this scheduler
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        self.schedule = NoiseSchedule(self.scheduler)
        guided_by, self.sampling = sampling
        step_ratio(settings.teacher_steps, settings.steps)
        drawn = sampler_steps(settings.steps, self.scheduler.config.num_train_timesteps, settings.grid == "discrete")
        check_falling(self.schedule, drawn.begins, drawn.ends, f"{settings.steps} steps")
        self.guided = step_objective(settings.guidance_probability, *settings.guidance_range)
        # a model whose guidance is inside it has one branch: its w only chooses what it is asked for
        self.guidance: Guidance = guidance_of(student.unet, self.sampling.guidance)
        self.teacher_guidance: Guidance = guidance_of(teacher, guided_by.guidance)
        self._made: dict[tuple[int, int], torch.Tensor] = {}  # targets of a step's first pass, for its second

    def to(self, device: torch.device) -> None:
        """Moves the teacher too."""
        super().to(device)
        self.teacher.to(device)
        self.null = self.null.to(device)

    def _precise(self) -> AbstractContextManager:
        """The teacher's networks run in fp32 unless the recipe says bf16; the algebra always is fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.distill.teacher_precision == "bf16")

    def spans(self, batch: Batch) -> Span:
        """Random student steps of the grid, or of continuous time."""
        discrete, steps = self.distill.grid == "discrete", self.distill.steps
        u = batch.rand()
        numbers = (u * steps).floor().clamp(max=steps - 1) if discrete else u * (steps - 1)
        return spans(numbers, self.distill.teacher_steps, steps, self.scheduler.config.num_train_timesteps, discrete)

    @torch.no_grad()
    def target(self, z_t: torch.Tensor, span: Span, states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """ṽ: where K guided teacher steps from z_t end, as the v of the one student step that lands there."""
        guided = guided_predictor(self.teacher, states, self.null.to(z_t.device), scale, self.teacher_guidance)
        with self._precise(), remembered_text(self.teacher):
            z_end = rollout(lambda z, now: guided(z, now.float()), z_t, span.begins, span.ends, self.schedule)
        return v_target(z_t, z_end, self.schedule.at(span.begins[0], z_t), self.schedule.at(span.end, z_t))

    def distilled(self, batch: Batch) -> tuple[Distilled, torch.Tensor]:
        """The batch with its targets, and its clean latents x."""
        x, states = self.clean(batch)
        span, scale, noise = self.spans(batch), self.guided.guidance_scale(batch), batch.randn(*x.shape[1:])
        z_t = add_noise(x, noise, self.schedule.at(span.begins[0], x))
        x, z_t, states, scale = (value.to(self.device) for value in (x, z_t, states, scale))
        target = self._made.pop((batch.step, batch.start), None)
        if target is None:
            make = partial(self.target, z_t, span, states, scale)
            target = (self.targets.get(batch, make) if self.targets else make()).to(self.device)
        return Distilled(z_t, span, states, scale, target), x

    def student(self, model: nn.Module, made: Distilled) -> torch.Tensor:
        """The student's guided v [B, C, h, w], fp32."""
        now = made.span.begins[0].float().to(self.device)
        return guided_prediction(model, made.z_t, now, made.states, self.null, made.scale, self.guidance)  # type: ignore[arg-type]

    def original(self, model: nn.Module, x: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """L_ori = |v_η(z_t) − v|² at t ~ U[0, T), unguided, on an `original_share` of the global batch.

        The mean of it over equal parts of a batch is that of the whole, also where parts have unequal shares.
        """
        chosen = evenly_shared(batch.total, self.distill.original_share)
        weights = chosen[batch.start : batch.start + len(x)] * (batch.total / chosen.sum())
        times = batch.rand() * (self.scheduler.config.num_train_timesteps - 1)
        noise = batch.randn(*x.shape[1:]).to(self.device)
        rows = weights.nonzero()[:, 0] if bool(weights.any()) else torch.arange(1)  # all processes call the network
        here = rows.to(self.device)
        count, x, noise, states, times = len(x), x[here], noise[here], states[here], times[rows]
        at, ones = self.schedule.at(times, x), torch.ones(len(x))
        z_t, given = add_noise(x, noise, at), times.to(self.device)
        v = guided_prediction(model, z_t, given, states, self.null, ones, self.guidance)  # type: ignore[arg-type]
        error = (v - v_of(x, noise, at)).square().flatten(1).mean(1)
        return (error * weights[rows].to(self.device)).sum() / count

    def _distilled_loss(self, model: nn.Module, made: Distilled) -> torch.Tensor:
        at = self.schedule.at(made.span.begins[0], made.z_t)
        normalised = made.scale if self.distill.guidance_normalised else None
        return distillation_loss(self.student(model, made), made.target, at, normalised)

    def means(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """L_dstl and L_ori, [2], which dynamic scaling compares over the whole step."""
        if not (self.distill.original_weight and self.distill.dynamic_scaling):
            return None
        made, x = self.distilled(batch)
        found = torch.stack([self._distilled_loss(model, made), self.original(model, x, made.states, batch)])
        self._made[batch.step, batch.start] = made.target
        return found

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Logs L_dstl as it is trained and L_ori, unweighted."""
        made, x = self.distilled(batch)
        distilled = self._distilled_loss(model, made)
        logged = {"distilled": distilled.item()}
        if not self.distill.original_weight:
            return distilled, logged
        original = self.original(model, x, made.states, batch)
        scale = 1.0
        if self.distill.dynamic_scaling:
            means = batch.means
            if means is None:  # this part is all that this process has of the step
                means = mean_over_processes(torch.stack([distilled.detach(), original.detach()]))
            scale = dynamic_scale(means[0], means[1])
        loss = distilled + self.distill.original_weight * scale * original
        return loss, logged | {"original": original.item()}

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """L_vani and L_cfg at the middle of the range, on held-out pairs at fixed noise and every step of the grid.

        Both in the paper's form, whether training normalises by guidance or not, so that runs can be compared.
        """
        x, noise, states = self.held_out_pairs()
        steps, table = self.distill.steps, self.scheduler.config.num_train_timesteps

        def losses(rows: torch.Tensor) -> torch.Tensor:
            span = spans(rows % steps, self.distill.teacher_steps, steps, table)
            z_t = add_noise(x[rows], noise[rows], self.schedule.at(span.begins[0], x)).to(self.device)
            given, found = states[rows].to(self.device), []
            for w in (1.0, float(np.mean(self.distill.guidance_range))):
                scale = torch.full((len(rows),), w, device=self.device)
                made = Distilled(z_t, span, given, scale, self.target(z_t, span, given, scale))
                at = self.schedule.at(span.begins[0], z_t)
                found.append(distillation_loss(self.student(model, made), made.target, at))
            return torch.stack(found)

        vanilla, guided = shared(len(x), 2, losses).mean(0).tolist()
        return {"val_vanilla": vanilla, "val_guided": guided}


def targets_depend_on(settings: StepDistillSettings, num_train_timesteps: int) -> dict[str, Any]:
    """What shared targets depend on: settings, and the times of every student step."""
    discrete = settings.grid == "discrete"
    times = spans(torch.arange(settings.steps), settings.teacher_steps, settings.steps, num_train_timesteps, discrete)
    named = {"steps", "teacher_steps", "guidance_probability", "guidance_range", "grid", "teacher_precision"}
    return settings.model_dump(mode="json", include=named) | {"times": [value.tolist() for value in times]}


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
