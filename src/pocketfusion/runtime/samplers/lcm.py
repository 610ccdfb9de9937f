"""Multistep consistency sampling of a latent consistency model (Luo et al., arXiv 2310.04378, algorithm 3)."""

from __future__ import annotations

from pocketfusion.runtime.samplers.linear_step import NoiseLevels, Schedule, Step
from pocketfusion.runtime.samplers.spacing import distilled_grid
from pocketfusion.runtime.specs import SchedulerSpec

_TIMESTEP_SCALING, _SIGMA_DATA = 10.0, 0.5  # diffusers' defaults, which published models keep


def lcm(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """As `diffusers.LCMScheduler`: the picture that the UNet sees, fresh noise at the next timestep's level on it."""
    levels, timesteps = NoiseLevels(spec), distilled_grid(spec, num_inference_steps)
    steps = []
    for t, later in zip(timesteps.tolist(), [*timesteps[1:].tolist(), None], strict=True):
        alpha, sigma = levels.at(t)
        scaled = t * _TIMESTEP_SCALING
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / (scaled**2 + _SIGMA_DATA**2) ** 0.5
        scale, noise = (1.0, 0.0) if later is None else levels.at(later)
        # c_out x_0 + c_skip x, with x = alpha x_0 + sigma epsilon
        steps.append(Step(alpha, sigma, scale * (c_out + c_skip * alpha), scale * c_skip * sigma, noise))
    return Schedule(timesteps, steps)
