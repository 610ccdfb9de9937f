"""DDIM algebra, once, in fp32: the noise schedule at any time, v ↔ ε ↔ x₀, steps, rollouts and distillation targets.

Notation of SnapFusion (arXiv 2306.00980, section 4): z_t = α_t x + σ_t ε with α² + σ² = 1. Written as the angle φ with
α = cos φ and σ = sin φ (Salimans & Ho, arXiv 2202.00512, appendix D), v = α ε − σ x is the derivative of z by φ, and a
DDIM step is a rotation. That form never divides by a small α or σ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.samplers.linear_step import trailing_timesteps

#: z_t [B, C, h, w] and times [B] → ṽ [B, C, h, w]
Predictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Level(NamedTuple):
    """α and σ of each sample, shaped to multiply latents: [B, 1, 1, 1], fp32."""

    alpha: torch.Tensor
    sigma: torch.Tensor


class NoiseSchedule:
    """α_t and σ_t of a scheduler's table at real times t in [−1, T − 1]; −1 is where sampling ends.

    Between whole timesteps φ is interpolated linearly; at whole ones the scheduler's table is returned.
    """

    def __init__(self, scheduler: DDIMScheduler):
        table = scheduler.alphas_cumprod.double().numpy()
        end = float(scheduler.final_alpha_cumprod)
        table = np.concatenate([[end], table]).clip(0.0, 1.0)
        self.phi = np.arctan2(np.sqrt(1 - table), np.sqrt(table))
        self.num_train_timesteps = len(table) - 1

    def angle(self, times: torch.Tensor) -> torch.Tensor:
        """φ_t for times [B], float64 on the CPU. Raises ValueError outside [−1, T − 1]."""
        t = times.detach().double().cpu().numpy()
        if t.size and not (t.min() >= -1 and t.max() <= self.num_train_timesteps - 1):
            raise ValueError(f"times from {t.min():g} to {t.max():g} leave [-1, {self.num_train_timesteps - 1}]")
        return torch.from_numpy(np.interp(t + 1, np.arange(len(self.phi)), self.phi))

    def at(self, times: torch.Tensor, like: torch.Tensor) -> Level:
        """α and σ at times [B], on `like`'s device and of its rank."""
        phi = self.angle(times)
        return Level(*(_column(value.float(), like) for value in (phi.cos(), phi.sin())))


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


def add_noise(x: torch.Tensor, noise: torch.Tensor, at: Level) -> torch.Tensor:
    """z = α x + σ ε."""
    return at.alpha * x + at.sigma * noise


def v_of(x: torch.Tensor, noise: torch.Tensor, at: Level) -> torch.Tensor:
    """v = α ε − σ x."""
    return at.alpha * noise - at.sigma * x


def x_from_v(z: torch.Tensor, v: torch.Tensor, at: Level) -> torch.Tensor:
    """x̂ = α z − σ v."""
    return at.alpha * z - at.sigma * v


def noise_from_v(z: torch.Tensor, v: torch.Tensor, at: Level) -> torch.Tensor:
    """ε̂ = σ z + α v."""
    return at.sigma * z + at.alpha * v


def v_from_noise(z: torch.Tensor, noise: torch.Tensor, at: Level) -> torch.Tensor:
    """v = (ε̂ − σ z) / α: what an ε-model says of v; ill-conditioned where α is small."""
    return (noise - at.sigma * z) / at.alpha


def v_from_x(z: torch.Tensor, x: torch.Tensor, at: Level) -> torch.Tensor:
    """v = (α z − x̂) / σ."""
    return (at.alpha * z - x) / at.sigma


def ddim_step(z: torch.Tensor, v: torch.Tensor, at: Level, to: Level) -> torch.Tensor:
    """z_to = α_to (α z − σ v) + σ_to (σ z + α v) (Song et al., arXiv 2010.02502, eq. 12, η = 0)."""
    return to.alpha * x_from_v(z, v, at) + to.sigma * noise_from_v(z, v, at)


def rollout(
    predict: Predictor, z: torch.Tensor, begins: torch.Tensor, ends: torch.Tensor, schedule: NoiseSchedule
) -> torch.Tensor:
    """K DDIM steps of `predict` from z, with their `begins` and `ends` [K, B] (SnapFusion eq. 7 for K = 2)."""
    for now, then in zip(begins, ends, strict=True):
        z = ddim_step(z, predict(z, now), schedule.at(now, z), schedule.at(then, z))
    return z


def x_target(z_t: torch.Tensor, z_end: torch.Tensor, at: Level, to: Level) -> torch.Tensor:
    """x̃ from which one step lands on the teacher's end: (z″ − (σ″/σ) z) / (α″ − (σ″/σ) α) (SnapFusion eq. 8)."""
    ratio = to.sigma / at.sigma
    return (z_end - ratio * z_t) / (to.alpha - ratio * at.alpha)


def v_target(z_t: torch.Tensor, z_end: torch.Tensor, at: Level, to: Level) -> torch.Tensor:
    """The same target as v: (cos δ z − z″) / sin δ with δ = φ − φ″.

    Equal to (α z − x̃) / σ, but it divides by sin δ alone: at the first of 8 steps by 0.13 where x̃ divides by 0.068 and
    then amplifies that error by α again.
    """
    cos_delta = at.alpha * to.alpha + at.sigma * to.sigma
    sin_delta = at.sigma * to.alpha - at.alpha * to.sigma
    return (cos_delta * z_t - z_end) / sin_delta


def truncated_snr(at: Level) -> torch.Tensor:
    """max(α²/σ², 1): SnapFusion's weight of |x̂ − x̃|²."""
    return (at.alpha / at.sigma).square().clamp(min=1.0)


def truncated_snr_in_v(at: Level) -> torch.Tensor:
    """max(α², σ²), in [½, 1]: the same weight of |v̂ − ṽ|², because x̂ − x̃ = −σ (v̂ − ṽ)."""
    return torch.maximum(at.alpha.square(), at.sigma.square())


class Steps(NamedTuple):
    """Where DDIM steps begin (the times that the network is told) and where they end, float64; −1 is the end."""

    begins: torch.Tensor
    ends: torch.Tensor


def sampler_steps(num_inference_steps: int, num_train_timesteps: int, discrete: bool = True) -> Steps:
    """The N steps [N] of a sampler with `trailing` spacing, as diffusers' DDIMScheduler and the runtime take them.

    They begin at T − k T/N − 1 rounded, and each ends ⌊T/N⌋ timesteps further (below 0 at −1): what rounding leaves
    between a step's end and the next one's beginning (of 16 steps: 875 and 874) is those samplers' own. In continuous
    time (`discrete` false) nothing is rounded. Raises PocketfusionError unless 1 <= N <= T.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise PocketfusionError(f"the number of steps is {num_inference_steps}: choose 1 to {num_train_timesteps}")
    if discrete:
        begins = torch.from_numpy(trailing_timesteps(num_inference_steps, num_train_timesteps)).double()
        ends = begins - num_train_timesteps // num_inference_steps
    else:
        steps = torch.arange(num_inference_steps + 1, dtype=torch.float64)
        times = num_train_timesteps * (1 - steps / num_inference_steps) - 1
        begins, ends = times[:-1], times[1:]
    return Steps(begins, ends.clamp(min=-1.0))


def step_ratio(teacher_steps: int, steps: int) -> int:
    """How many teacher steps one student step replaces.

    Raises PocketfusionError unless the teacher's steps are a multiple of the student's and more.
    """
    if steps < 1 or teacher_steps <= steps or teacher_steps % steps:
        near = max(2, math.ceil(teacher_steps / max(steps, 1))) * max(steps, 1)
        raise PocketfusionError(
            f"{teacher_steps} teacher steps do not divide into {steps} student steps: give a multiple such as {near}"
        )
    return teacher_steps // steps


class Span(NamedTuple):
    """Student steps and the teacher's K in each: the teacher's `begins` and `ends` [K, B], the student's `end` [B].

    Both begin at `begins[0]`.
    """

    begins: torch.Tensor
    ends: torch.Tensor
    end: torch.Tensor


def spans(
    numbers: torch.Tensor, teacher_steps: int, steps: int, num_train_timesteps: int, discrete: bool = True
) -> Span:
    """The student's steps `numbers` [B]: whole ones in 0 … N − 1 are those of its sampler (`sampler_steps`).

    Student and teacher step as they are drawn: a student that lands where the span's teacher does, by its own
    sampler's step, draws in N steps what the teacher draws in K N, whatever the two grids' rounding. Where a time of
    both falls halfway, diffusers may round it to neighbours (16 steps of 48: 937, 936): then the teacher is told the
    student's. In continuous time (`discrete` false) numbers are real in [0, N − 1] and nothing is rounded.
    """
    ratio = step_ratio(teacher_steps, steps)
    if discrete:
        student, teacher = (sampler_steps(count, num_train_timesteps) for count in (steps, teacher_steps))
        numbers = numbers.long()
        rows = numbers[None] * ratio + torch.arange(ratio)[:, None]
        begins, ends = teacher.begins[rows], teacher.ends[rows]
        begins[0] = student.begins[numbers]
        ends[0] = (begins[0] - num_train_timesteps // teacher_steps).clamp(min=-1.0)
        return Span(begins, ends, student.ends[numbers])
    first = num_train_timesteps * (1 - numbers.double() / steps) - 1
    offsets = torch.arange(ratio + 1, dtype=torch.float64) * (num_train_timesteps / teacher_steps)
    times = (first[None] - offsets[:, None]).clamp(min=-1.0)
    return Span(times[:-1], times[1:], times[-1])


def check_falling(schedule: NoiseSchedule, begins: torch.Tensor, ends: torch.Tensor, what: str) -> None:
    """Raises PocketfusionError, of `what`, if a jump from `begins` to `ends` has no less noise where it ends."""
    if not bool((schedule.angle(ends) < schedule.angle(begins)).all()):
        raise PocketfusionError(f"{what} are finer than the noise schedule: choose fewer, such as 32")
