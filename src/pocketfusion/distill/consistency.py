"""`distill-consistency`: fewer than eight steps, by consistency distillation in phases on the sampler's own grid.

Phased Consistency Models (Wang et al., arXiv 2405.18407; the same idea as Heek et al., arXiv 2403.06807): N steps of
the sampler cut time into N phases, and inside each the student learns to jump to the phase's end. N = 1 is consistency
distillation (Song et al., arXiv 2303.01469), with guidance inside the teacher's ODE as in LCM (arXiv 2310.04378).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from diffusers import DDIMScheduler
from torch import nn

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.distill.compatible import check_teacher
from pocketfusion.distill.ddim import (
    Level,
    NoiseSchedule,
    add_noise,
    check_falling,
    ddim_step,
    rollout,
    spans,
    step_ratio,
    truncated_snr_in_v,
    v_target,
)
from pocketfusion.distill.guidance import with_guidance_input
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, folder_hash
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.guided import guidance_of, guided_prediction
from pocketfusion.models.sampling import Guidance, Sampling, read_sampling
from pocketfusion.recipe import ConsistencySettings, Recipe
from pocketfusion.train.batch import Batch, shared
from pocketfusion.train.memory.sharded import is_sharded
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result
from pocketfusion.train.start import Start, identity, open_start, train_on
from pocketfusion.train.teacher import TeacherTask, fast_attention

ALL = slice(None)


class RowPredictor(Protocol):
    """A `Predictor` that also takes a part of its batch."""

    def __call__(self, z: torch.Tensor, now: torch.Tensor, rows: torch.Tensor | slice = ALL) -> torch.Tensor:
        """z [R, C, h, w], times [R], which rows [R] of the batch they are → ṽ [R, C, h, w]."""


def phase_times(numbers: torch.Tensor, teacher_steps: int, steps: int, num_train_timesteps: int) -> torch.Tensor:
    """Times of teacher steps `numbers` [B] in 0 … K N − 1, [4, B]: begin, end, the next step's begin, the phase's end.

    Phases are the student's steps as it is drawn (see `spans`); in a phase's last step the third is the phase's end.
    Raises PocketfusionError as `step_ratio` does.
    """
    ratio, numbers = step_ratio(teacher_steps, steps), numbers.long()
    phase, at = numbers // ratio, numbers % ratio
    span = spans(phase, teacher_steps, steps, num_train_timesteps)
    afters = torch.cat([span.begins[1:], span.end[None]])
    rows = torch.arange(len(numbers))
    return torch.stack([span.begins[at, rows], span.ends[at, rows], afters[at, rows], span.end])


@torch.no_grad()
def consistency_target(
    teacher: RowPredictor, student: RowPredictor, z_t: torch.Tensor, times: torch.Tensor, schedule: NoiseSchedule
) -> torch.Tensor:
    """ṽ: one teacher step from z_t, the student's own jump from there to the phase's end, as the v of a single jump.

    Where the teacher's step reaches the phase's end there is nothing left to jump over (the boundary condition holds
    by construction) and the target is the teacher's own v but for the grid's rounding: step distillation. An error of
    the student's at t′ enters as sin(φ_t′ − φ_s) / sin(φ_t − φ_s) of itself, less than whole. times [4, B] as of
    `phase_times`.
    """
    at, then, after, end = (schedule.at(now, z_t) for now in times)
    z_end = ddim_step(z_t, teacher(z_t, times[0]), at, then)
    inside = (times[2] != times[3]).nonzero()[:, 0]
    if len(inside):
        rows = inside.to(z_t.device)
        begun, levels = z_end[rows], [Level(level.alpha[rows], level.sigma[rows]) for level in (after, end)]
        z_end[rows] = ddim_step(begun, student(begun, times[2][inside], rows), *levels)
    return v_target(z_t, z_end, at, end)


def consistency_loss(v: torch.Tensor, target: torch.Tensor, at: Level, huber_c: float | None = None) -> torch.Tensor:
    """Mean over samples of e² = max(α², σ²) |v − ṽ|² (mean over elements), or of √(e² + c²) − c; scalar, fp32.

    The second is the pseudo-Huber metric of Song & Dhariwal (arXiv 2310.14189), divided by √d: c is theirs per √d.
    """
    squared = (v.float() - target).square().flatten(1).mean(1) * truncated_snr_in_v(at).flatten()
    return (squared if huber_c is None else (squared + huber_c**2).sqrt() - huber_c).mean()


class Jumps(NamedTuple):
    """A batch on the device: z_t, caption states, guidance scales [B]; on the CPU the times of `phase_times` [4, B].

    Of held-out jumps, `times` are where they begin alone, [1, B].
    """

    z_t: torch.Tensor
    times: torch.Tensor
    states: torch.Tensor
    scale: torch.Tensor


class ConsistencyTask(TeacherTask):
    """Student N steps: from anywhere in a phase it learns to jump to where it would from one teacher step further.

    The target network is the student itself, detached: μ = 0 for Song et al.'s average of its weights, which Song &
    Dhariwal (arXiv 2310.14189) found best for consistency training, and nothing more to store and resume.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: ConsistencySettings,
        data: CaptionedImages,
        student: Start,
        teacher: ElasticUNet,
        sampling: Sampling,
        teacher_guidance: Guidance,
    ):
        """`sampling`: how the result is drawn. Raises PocketfusionError if the steps do not divide or are too many."""
        super().__init__(recipe, data, student.unet, student.vae, student.text, settings.train)
        self.consistency, self.sampling = settings, sampling
        self.teacher, self.teacher_guidance = teacher.eval().requires_grad_(False), teacher_guidance
        self.teachers = (self.teacher,)
        # few steps must begin at the last timestep: the result's folder gets this scheduler
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        self.schedule = NoiseSchedule(self.scheduler)
        step_ratio(settings.teacher_steps, settings.steps)
        count = settings.teacher_steps
        jumps = phase_times(torch.arange(count), count, settings.steps, self.scheduler.config.num_train_timesteps)
        check_falling(self.schedule, jumps[0], jumps[3], f"{count} teacher steps")
        self._held_out: dict[int, tuple[Jumps, torch.Tensor, torch.Tensor]] = {}  #: by their first row

    def to(self, device: torch.device) -> None:
        """Moves the teacher too."""
        super().to(device)
        self.teacher.to(device)
        self.null = self.null.to(device)

    def _precision(self) -> AbstractContextManager:
        """Of the target's networks: fp32 unless the recipe says bf16; the algebra always is fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.consistency.teacher_precision == "bf16")

    def predictor(self, unet: nn.Module, guidance: Guidance, made: Jumps) -> RowPredictor:
        """`unet`'s guided v for rows of `made`."""

        def predict(z: torch.Tensor, now: torch.Tensor, rows: torch.Tensor | slice = ALL) -> torch.Tensor:
            given = now.float().to(z.device), made.states[rows], self.null.to(z.device), made.scale[rows]
            return guided_prediction(unet, z, *given, guidance)  # type: ignore[arg-type]

        return predict

    def scales(self, u: torch.Tensor) -> torch.Tensor:
        """Guidance scales [B] for `u` [B] uniform in [0, 1)."""
        if self.sampling.guidance == "folded":
            return torch.full_like(u, self.sampling.guidance_scale)
        low, high = self.consistency.guidance_range
        return low + (high - low) * u

    def jumps(self, batch: Batch) -> Jumps:
        """Random teacher steps of the grid, noised to where they begin."""
        x, states = self.clean(batch)
        count, table = self.consistency.teacher_steps, self.scheduler.config.num_train_timesteps
        times = phase_times(batch.randint(count), count, self.consistency.steps, table)
        scale, noise = self.scales(batch.rand()), batch.randn(*x.shape[1:])
        z_t = add_noise(x, noise, self.schedule.at(times[0], x))
        return Jumps(z_t.to(self.device), times, states.to(self.device), scale.to(self.device))

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """`consistency_loss`, with the gradient through the student at z_t alone; logs the mean of e²."""
        made = self.jumps(batch)
        teacher = self.predictor(self.teacher, self.teacher_guidance, made)
        itself = self.predictor(self.model, self.sampling.guidance, made)  # not the wrapper: no gradient is shared
        with self._precision():
            target = consistency_target(teacher, itself, made.z_t, made.times, self.schedule)
            if is_sharded(self.model) and not (made.times[2] != made.times[3]).any():
                with torch.no_grad():  # all processes call the network, whatever their samples need
                    itself(made.z_t[:1], made.times[2][:1], torch.arange(1))
        v = self.predictor(model, self.sampling.guidance, made)(made.z_t, made.times[0])
        at = self.schedule.at(made.times[0], made.z_t)
        squared = consistency_loss(v.detach(), target, at).item()
        c = self.consistency.huber_c if self.consistency.loss == "huber" else None
        return consistency_loss(v, target, at, c), {"squared": squared}

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """What it is all for: each phase's jump against the teacher's steps, on held-out pairs, as it will be drawn.

        `val_landing`: e² of the jump from a phase's beginning. `val_landing_left`: that over the e² of a single
        teacher step there; 1 is a teacher drawn in N steps, 0 a student that draws what it does in K N.
        """

        def errors(rows: torch.Tensor) -> torch.Tensor:
            block = int(rows[0])
            if block not in self._held_out:
                self._held_out[block] = self._hold_out(rows)
            made, target, first = self._held_out[block]
            at = self.schedule.at(made.times[0], made.z_t)
            v = self.predictor(model, self.sampling.guidance, made)(made.z_t, made.times[0])
            return torch.stack([consistency_loss(v, target, at), consistency_loss(first, target, at)])

        error, single = shared(len(self.held_out), 2, errors).mean(0).tolist()
        return {"val_landing": error, "val_landing_left": error / single if single else 0.0}

    def _hold_out(self, rows: torch.Tensor) -> tuple[Jumps, torch.Tensor, torch.Tensor]:
        """Held-out jumps, their targets and the teacher's first v there; made once, as the teacher is frozen."""
        x, noise, states = (value[rows] for value in self.held_out_pairs())
        steps, table = self.consistency.steps, self.scheduler.config.num_train_timesteps
        span = spans(rows % steps, self.consistency.teacher_steps, steps, table)
        begin = span.begins[0]
        z_t = add_noise(x, noise, self.schedule.at(begin, x)).to(self.device)
        scale = torch.full((len(rows),), self.sampling.guidance_scale, device=self.device)
        made = Jumps(z_t, begin[None], states.to(self.device), scale)
        predict = self.predictor(self.teacher, self.teacher_guidance, made)
        with self._precision():
            first = predict(z_t, begin)
            z_end = rollout(predict, z_t, span.begins, span.ends, self.schedule)
        ends = self.schedule.at(begin, z_t), self.schedule.at(span.end, z_t)
        return made, v_target(z_t, z_end, *ends), first


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
