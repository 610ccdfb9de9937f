"""Euler's method on the probability flow (Karras et al., arXiv 2206.00364, algorithm 1), plain and ancestral."""

from __future__ import annotations

import numpy as np

from pocketfusion.runtime.samplers.linear_step import NoiseLevels, Schedule, Step, of_sigma
from pocketfusion.runtime.samplers.spacing import spaced
from pocketfusion.runtime.specs import SchedulerSpec


def euler(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """As `diffusers.EulerDiscreteScheduler`: from sigma to the next, with epsilon unchanged."""
    return _schedule(spec, num_inference_steps, ancestral=False)


def euler_ancestral(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """As `diffusers.EulerAncestralDiscreteScheduler`: beyond the next sigma, then back to it with fresh noise."""
    return _schedule(spec, num_inference_steps, ancestral=True)


def _schedule(spec: SchedulerSpec, num_inference_steps: int, *, ancestral: bool) -> Schedule:
    levels, n = NoiseLevels(spec), spec.num_train_timesteps
    timesteps: np.ndarray = spaced(spec, num_inference_steps)
    if spec.timestep_spacing == "linspace":  # between whole timesteps, rounded to float32 as there
        timesteps = np.linspace(0, n - 1, num_inference_steps, dtype=np.float32)[::-1].astype(np.float64)
    final = levels.sigmas[0] if spec.final_sigmas_type == "sigma_min" and not ancestral else 0.0
    sigmas = [*np.interp(timesteps, np.arange(n), levels.sigmas).tolist(), float(final)]
    steps = []
    for k, (now, later) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        up = (later**2 * (now**2 - later**2)) ** 0.5 / now if ancestral else 0.0
        down = (later**2 - up**2) ** 0.5
        # of latents with x_0 at weight 1, but those of the last step are scaled to the UNet's
        scale = of_sigma(later)[0] if k < len(timesteps) - 1 else 1.0
        steps.append(Step(*of_sigma(now), scale, scale * down, scale * up))
    # diffusers begins at noise alone times sigma, except with leading spacing: there as if a picture lay below it
    initial_scale = 1.0 if spec.timestep_spacing == "leading" else of_sigma(sigmas[0])[1]
    return Schedule(timesteps, steps, initial_scale)
