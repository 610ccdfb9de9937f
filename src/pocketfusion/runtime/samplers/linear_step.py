"""What all samplers have in common: a step mixes x_0, epsilon, fresh noise and the step before's x_0.

A sampler decides at which noise levels the UNet is asked and with which weights the four are mixed, all of it known
before the first step; which timesteps it visits are spacings of arXiv 2305.08891, table 2. The latents are in every
sampler the UNet's own, x = alpha x_0 + sigma epsilon with alpha^2 + sigma^2 = 1: where diffusers has Euler's with x_0
at weight 1 and scales them for the UNet, these are its scaled ones, but for the last ones, which are the decoder's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pocketfusion.runtime.specs import ORIGINAL_STEPS, SchedulerSpec


class NoiseLevels:
    """The levels that a schedule was trained on, by timestep, float64 [num_train_timesteps]."""

    def __init__(self, spec: SchedulerSpec) -> None:
        self.alphas_cumprod = spec.alphas_cumprod()
        #: sigma / alpha, the levels of latents with x_0 at weight 1 (Karras et al., arXiv 2206.00364)
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5

    def at(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) at a timestep of the table."""
        return of_alpha_bar(float(self.alphas_cumprod[timestep]))


def of_alpha_bar(alpha_bar: float) -> tuple[float, float]:
    """(alpha, sigma) of alpha^2."""
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def of_sigma(sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of their ratio sigma / alpha."""
    alpha = 1 / (sigma**2 + 1) ** 0.5
    return alpha, sigma * alpha


@dataclass(frozen=True)
class Step:
    """The UNet is asked of x = alpha x_0 + sigma epsilon; the others are weights, whose sum is the next latents."""

    alpha: float
    sigma: float
    x_0: float
    epsilon: float
    noise: float = 0.0
    previous_x_0: float = 0.0

    def coefficients(self, prediction_type: str) -> tuple[float, float]:
        """(a, b) of the next latents' part a x + b model_output, which is all of them but noise and previous x_0.

        x_0 and epsilon are linear in x and the output: by epsilon, x_0 = (x - sigma epsilon) / alpha; by v (Salimans &
        Ho, arXiv 2202.00512, appendix D), x_0 = alpha x - sigma v and epsilon = alpha v + sigma x.
        """
        if prediction_type == "epsilon":
            return self.x_0 / self.alpha, self.epsilon - self.x_0 * self.sigma / self.alpha
        return self.x_0 * self.alpha + self.epsilon * self.sigma, self.epsilon * self.alpha - self.x_0 * self.sigma


@dataclass(frozen=True)
class Schedule:
    """A sampler's steps [N]: the timesteps that the UNet is given, falling, and the scale of the starting noise."""

    timesteps: npt.NDArray[np.int64] | npt.NDArray[np.float64]
    steps: list[Step]
    initial_scale: float = 1.0


Timesteps = npt.NDArray[np.int64]


def spaced(spec: SchedulerSpec, steps: int) -> Timesteps:
    """`steps` whole timesteps, falling, as DDIM takes them.

    Departs from diffusers where that fails: its `leading` spacing with as many steps as the table has and an offset
    begins beyond the table (here the offset shrinks to what fits), and its `trailing` spacing rounds to one step too
    many, at timestep -1, for some counts (61 is one; here the last is dropped).
    """
    n = spec.num_train_timesteps
    if spec.timestep_spacing == "leading":
        return _leading(np.arange(steps)[::-1] * (n // steps), spec)
    if spec.timestep_spacing == "linspace":
        return np.linspace(0, n - 1, steps).round()[::-1].astype(np.int64)
    return trailing_timesteps(steps, n)


def spaced_above_zero(spec: SchedulerSpec, steps: int) -> Timesteps:
    """The same as DPM-Solver takes them: of one step more, without the last, which would be at (or near) 0."""
    n = spec.num_train_timesteps
    if spec.timestep_spacing == "leading":
        return _leading(np.arange(1, steps + 1)[::-1] * (n // (steps + 1)), spec)
    if spec.timestep_spacing == "linspace":
        return np.linspace(0, n - 1, steps + 1).round()[:0:-1].astype(np.int64)
    return trailing_timesteps(steps, n)


def distilled_grid(spec: SchedulerSpec, steps: int) -> Timesteps:
    """The same as LCM and TCD take them, whatever the spacing: of the original steps that they were taught."""
    original = min(ORIGINAL_STEPS, spec.num_train_timesteps)
    taught = np.arange(original, 0, -1) * (spec.num_train_timesteps // original) - 1
    return taught[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(np.int64)]


def _leading(timesteps: Timesteps, spec: SchedulerSpec) -> Timesteps:
    return timesteps + min(spec.steps_offset, spec.num_train_timesteps - 1 - int(timesteps[0]))


def trailing_timesteps(num_inference_steps: int, num_train_timesteps: int) -> Timesteps:
    """T − k T/N − 1 for k = 0 … N − 1, rounded: [num_inference_steps] int64, falling from T − 1."""
    # arange, as diffusers has it: its own rounding decides where a timestep falls halfway (48 steps: 937.5)
    falling = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_inference_steps)[:num_inference_steps]
    return np.round(falling).astype(np.int64) - 1
