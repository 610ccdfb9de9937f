"""Strategic stochastic sampling, of trajectory consistency distillation (Zheng et al., arXiv 2402.19159)."""

from __future__ import annotations

import math

from pocketfusion.runtime.samplers.linear_step import NoiseLevels, Schedule, Step
from pocketfusion.runtime.samplers.spacing import distilled_grid
from pocketfusion.runtime.specs import SchedulerSpec


def tcd(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """As `diffusers.TCDScheduler`: DDIM to (1 - eta) of the next timestep, then noised up to that."""
    levels, timesteps = NoiseLevels(spec), distilled_grid(spec, num_inference_steps)
    steps = []
    for t, later in zip(timesteps.tolist(), [*timesteps[1:].tolist(), 0], strict=True):
        target = math.floor((1 - spec.eta) * later)
        alpha, sigma = levels.at(target)
        kept = float(levels.alphas_cumprod[later] / levels.alphas_cumprod[target])
        steps.append(Step(*levels.at(t), kept**0.5 * alpha, kept**0.5 * sigma, (1 - kept) ** 0.5))
    return Schedule(timesteps, steps)
