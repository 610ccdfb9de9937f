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


def rollout(predict: Predictor, z: torch.Tensor, times: torch.Tensor, schedule: NoiseSchedule) -> torch.Tensor:
    """DDIM steps of `predict` along times [K + 1, B] from z at times[0] to times[K] (SnapFusion eq. 7 for K = 2)."""
    for now, then in zip(times[:-1], times[1:], strict=True):
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


def timesteps(num_inference_steps: int, num_train_timesteps: int, discrete: bool = True) -> torch.Tensor:
    """The times that N steps visit and end at, [N + 1] float64: T − k T/N − 1 for k = 0 … N; the last is −1.

    `discrete` rounds to whole timesteps as diffusers' `trailing` spacing does. Raises PocketfusionError unless
    1 <= N <= T.
    """
    if not 1 <= num_inference_steps <= num_train_timesteps:
        raise PocketfusionError(f"the number of steps is {num_inference_steps}: choose 1 to {num_train_timesteps}")
    # arange, as diffusers has it: its own rounding decides where a timestep falls halfway
    falling = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_inference_steps)[:num_inference_steps]
    times = np.append((np.round(falling) if discrete else falling) - 1, -1.0)
    return torch.from_numpy(times)


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


def spans(
    numbers: torch.Tensor, teacher_steps: int, steps: int, num_train_timesteps: int, discrete: bool = True
) -> torch.Tensor:
    """Teacher times [K + 1, B] inside student steps `numbers` [B]: whole ones in 0 … N − 1 lie on the student's grid.

    In continuous time (`discrete` false) numbers are real in [0, N − 1] and the times are not rounded.
    """
    ratio = step_ratio(teacher_steps, steps)
    if discrete:
        grid = timesteps(teacher_steps, num_train_timesteps)
        return torch.stack([grid[numbers.long() * ratio + k] for k in range(ratio + 1)])
    begins = num_train_timesteps * (1 - numbers.double() / steps) - 1
    offsets = torch.arange(ratio + 1, dtype=torch.float64) * (num_train_timesteps / teacher_steps)
    return (begins[None] - offsets[:, None]).clamp(min=-1.0)
