"""DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2), as `diffusers.DPMSolverMultistepScheduler` does it."""

from __future__ import annotations

import math

import numpy as np

from pocketfusion.runtime.samplers.linear_step import NoiseLevels, Schedule, Step, of_sigma
from pocketfusion.runtime.samplers.spacing import spaced_above_zero
from pocketfusion.runtime.specs import SchedulerSpec

_RHO = 7.0  # Karras et al., arXiv 2206.00364, eq. 5
_FEW = 15  # steps, below which the last is of first order whatever the final sigma


def dpmpp_2m(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """With sigmas by the spacing's timesteps."""
    timesteps = spaced_above_zero(spec, num_inference_steps)
    return _schedule(spec, timesteps, NoiseLevels(spec).sigmas[timesteps])


def dpmpp_2m_karras(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """With Karras' sigmas from the table's last to its first, whatever the spacing; several may share a timestep.

    Departs from diffusers where steps share the first timestep: it begins with their second, this with their first.
    """
    table = NoiseLevels(spec).sigmas
    ramp = np.linspace(0, 1, num_inference_steps)
    sigmas = (table[-1] ** (1 / _RHO) + ramp * (table[0] ** (1 / _RHO) - table[-1] ** (1 / _RHO))) ** _RHO
    timesteps = np.interp(np.log(sigmas), np.log(table), np.arange(len(table))).round().astype(np.int64)
    return _schedule(spec, timesteps, sigmas)


def _schedule(spec: SchedulerSpec, timesteps: np.ndarray, levels: np.ndarray) -> Schedule:
    """First-order steps are DDIM's; a second-order one adds to x_0 what it changed by since the step before, times
    h / (2 h_0) with h and h_0 this step's and the last one's way in log(alpha / sigma)."""
    final = NoiseLevels(spec).sigmas[0] if spec.final_sigmas_type == "sigma_min" else 0.0
    sigmas = [*levels.tolist(), float(final)]
    last = len(timesteps) - 1
    steps = []
    for k, (now, later) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        alpha, sigma = of_sigma(later)
        change = 0.0
        if k > 0 and (k < last or (final > 0 and len(timesteps) >= _FEW)):
            h, h_0 = math.log(now / later), math.log(sigmas[k - 1] / now)
            change = alpha * (1 - later / now) * h / (2 * h_0)
        steps.append(Step(*of_sigma(now), alpha + change, sigma, previous_x_0=-change))
    return Schedule(timesteps, steps)
