"""Which timesteps a number of steps visits (spacings: arXiv 2305.08891, table 2), each sampler with diffusers' own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketfusion.runtime.specs import ORIGINAL_STEPS, SchedulerSpec

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
