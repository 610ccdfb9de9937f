"""DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 12), as `diffusers.DDIMScheduler` does it."""

from __future__ import annotations

from pocketfusion.runtime.samplers.linear_step import NoiseLevels, Schedule, Step, of_alpha_bar
from pocketfusion.runtime.samplers.spacing import spaced
from pocketfusion.runtime.specs import SchedulerSpec


def ddim(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """From each timestep t to t - N/steps, whatever the next one visited is; below 0, `set_alpha_to_one` says."""
    levels, timesteps = NoiseLevels(spec), spaced(spec, num_inference_steps)
    final = of_alpha_bar(1.0 if spec.set_alpha_to_one else float(levels.alphas_cumprod[0]))
    steps = []
    for t in timesteps.tolist():
        previous = t - spec.num_train_timesteps // num_inference_steps
        steps.append(Step(*levels.at(t), *(levels.at(previous) if previous >= 0 else final)))
    return Schedule(timesteps, steps)
