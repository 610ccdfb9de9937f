"""`distill-steps`: CFG-aware step distillation (SnapFusion, arXiv 2306.00980, section 4 and appendix C)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import nn

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.distill.ddim import (
    NoiseSchedule,
    add_noise,
    rollout,
    spans,
    step_ratio,
    v_of,
    v_target,
)
from pocketfusion.distill.objectives import distillation_loss, dynamic_scale, step_objective
from pocketfusion.distill.targets import TargetCache
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.guidance import guidance_of, guided_prediction
from pocketfusion.models.sampling import Guidance, Sampling
from pocketfusion.processes import mean_over_processes
from pocketfusion.recipe import Recipe, StepDistillSettings
from pocketfusion.train.batch import Batch
from pocketfusion.train.held_out import shared
from pocketfusion.train.start import Start
from pocketfusion.train.teacher import TeacherTask


class Distilled(NamedTuple):
    """A batch on the device: z_t and times [K + 1, B] of its student steps, caption states, w [B], targets ṽ."""

    z_t: torch.Tensor
    times: torch.Tensor
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
        # few steps must begin at the last timestep: the result's folder gets this scheduler
        self.scheduler = DDIMScheduler.from_config(self.scheduler.config, timestep_spacing="trailing")
        self.schedule = NoiseSchedule(self.scheduler)
        guided_by, self.sampling = sampling
        step_ratio(settings.teacher_steps, settings.steps)
        self.guided = step_objective(settings.guidance_probability, *settings.guidance_range)
        # a model whose guidance is inside it has one branch: its w only chooses what it is asked for
        self.guidance: Guidance = guidance_of(student.unet, self.sampling.guidance)
        self.teacher_guidance: Guidance = guidance_of(teacher, guided_by.guidance)

    def to(self, device: torch.device) -> None:
        """Moves the teacher too."""
        super().to(device)
        self.teacher.to(device)
        self.null = self.null.to(device)

    def _precise(self) -> AbstractContextManager:
        """The teacher's networks run in fp32 unless the recipe says bf16; the algebra always is fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.distill.teacher_precision == "bf16")

    def spans(self, batch: Batch) -> torch.Tensor:
        """Times [K + 1, B] of random student steps of the grid, or of continuous time."""
        discrete, steps = self.distill.grid == "discrete", self.distill.steps
        u = batch.rand()
        numbers = (u * steps).floor().clamp(max=steps - 1) if discrete else u * (steps - 1)
        return spans(numbers, self.distill.teacher_steps, steps, self.scheduler.config.num_train_timesteps, discrete)

    @torch.no_grad()
    def target(
        self, z_t: torch.Tensor, times: torch.Tensor, states: torch.Tensor, scale: torch.Tensor
    ) -> torch.Tensor:
        """ṽ: where K guided teacher steps from z_t end, as the v of one step that ends there."""

        def predict(z: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
            return guided_prediction(
                self.teacher, z, now.float().to(z.device), states, self.null.to(z.device), scale, self.teacher_guidance
            )

        with self._precise():
            z_end = rollout(predict, z_t, times, self.schedule)
        return v_target(z_t, z_end, self.schedule.at(times[0], z_t), self.schedule.at(times[-1], z_t))

    def distilled(self, batch: Batch) -> tuple[Distilled, torch.Tensor]:
        """The batch with its targets, and its clean latents x."""
        x, states = self.clean(batch)
        times, scale, noise = self.spans(batch), self.guided.guidance_scale(batch), batch.randn(*x.shape[1:])
        z_t = add_noise(x, noise, self.schedule.at(times[0], x))
        x, z_t, states, scale = (value.to(self.device) for value in (x, z_t, states, scale))
        make = partial(self.target, z_t, times, states, scale)
        target = (self.targets.get(batch, make) if self.targets else make()).to(self.device)
        return Distilled(z_t, times, states, scale, target), x

    def student(self, model: nn.Module, made: Distilled) -> torch.Tensor:
        """The student's guided v [B, C, h, w], fp32."""
        now = made.times[0].float().to(self.device)
        return guided_prediction(model, made.z_t, now, made.states, self.null, made.scale, self.guidance)  # type: ignore[arg-type]

    def original(self, model: nn.Module, x: torch.Tensor, states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """L_ori = |v_η(z_t) − v|² at t ~ U[0, T), unguided, on an `original_share` of the global batch."""
        # spread evenly, so that every process has its share
        position = torch.arange(batch.start, batch.start + len(x))
        share = self.distill.original_share
        part = (((position + 1) * share).floor() > (position * share).floor()).to(x.device)
        times = batch.rand() * (self.scheduler.config.num_train_timesteps - 1)
        noise = batch.randn(*x.shape[1:]).to(self.device)
        if not bool(part.any()):
            part = torch.ones_like(part)
        x, noise, states, times = x[part], noise[part], states[part], times[part.cpu()]
        at, ones = self.schedule.at(times, x), torch.ones(len(x))
        z_t, given = add_noise(x, noise, at), times.to(self.device)
        v = guided_prediction(model, z_t, given, states, self.null, ones, self.guidance)  # type: ignore[arg-type]
        return (v - v_of(x, noise, at)).square().mean()

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Logs L_dstl and L_ori unweighted."""
        made, x = self.distilled(batch)
        at = self.schedule.at(made.times[0], made.z_t)
        distilled = distillation_loss(self.student(model, made), made.target, at)
        logged = {"distilled": distilled.item()}
        if not self.distill.original_weight:
            return distilled, logged
        original = self.original(model, x, made.states, batch)
        scale = 1.0
        if self.distill.dynamic_scaling:  # of the whole batch's losses, whatever this process's part of it
            means = mean_over_processes(torch.stack([distilled.detach(), original.detach()]))
            scale = dynamic_scale(means[0], means[1])
        loss = distilled + self.distill.original_weight * scale * original
        return loss, logged | {"original": original.item()}

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """L_vani and L_cfg at the middle of the range, on held-out pairs at fixed noise and every step of the grid."""
        x, noise, states = self.held_out_pairs()
        steps, table = self.distill.steps, self.scheduler.config.num_train_timesteps

        def losses(rows: torch.Tensor) -> torch.Tensor:
            times = spans(rows % steps, self.distill.teacher_steps, steps, table)
            z_t = add_noise(x[rows], noise[rows], self.schedule.at(times[0], x)).to(self.device)
            given, found = states[rows].to(self.device), []
            for w in (1.0, float(np.mean(self.distill.guidance_range))):
                scale = torch.full((len(rows),), w, device=self.device)
                made = Distilled(z_t, times, given, scale, self.target(z_t, times, given, scale))
                found.append(
                    distillation_loss(self.student(model, made), made.target, self.schedule.at(times[0], z_t))
                )
            return torch.stack(found)

        vanilla, guided = shared(len(x), 2, losses).mean(0).tolist()
        return {"val_vanilla": vanilla, "val_guided": guided}


def identity_settings(settings: StepDistillSettings) -> dict[str, Any]:
    """What targets depend on."""
    return settings.model_dump(
        mode="json",
        include={"steps", "teacher_steps", "guidance_probability", "guidance_range", "grid", "teacher_precision"},
    )
