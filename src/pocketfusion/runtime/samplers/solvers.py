"""The samplers beside each other, each as its class of diffusers does it (tests/runtime hold them step by step).

DPM-Solver++(2M): Lu et al., arXiv 2211.01095, algorithm 2. Euler and Euler ancestral: Karras et al., arXiv 2206.00364.
DDIM with eta = 0: Song et al., arXiv 2010.02502, eq. 12. LCM: Luo et al., arXiv 2310.04378, algorithm 3. TCD: Zheng et
al., arXiv 2402.19159.
"""

from __future__ import annotations

import math

import numpy as np

from pocketfusion.runtime.samplers.linear_step import (
    NoiseLevels,
    Schedule,
    Step,
    distilled_grid,
    of_alpha_bar,
    of_sigma,
    spaced,
    spaced_above_zero,
)
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


def ddim(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """From each timestep t to t - N/steps, whatever the next one visited is; below 0, `set_alpha_to_one` says."""
    levels, timesteps = NoiseLevels(spec), spaced(spec, num_inference_steps)
    final = of_alpha_bar(1.0 if spec.set_alpha_to_one else float(levels.alphas_cumprod[0]))
    steps = []
    for t in timesteps.tolist():
        previous = t - spec.num_train_timesteps // num_inference_steps
        steps.append(Step(*levels.at(t), *(levels.at(previous) if previous >= 0 else final)))
    return Schedule(timesteps, steps)


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


def euler(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """As `diffusers.EulerDiscreteScheduler`: from sigma to the next, with epsilon unchanged."""
    return _euler_schedule(spec, num_inference_steps, ancestral=False)


def euler_ancestral(spec: SchedulerSpec, num_inference_steps: int) -> Schedule:
    """As `diffusers.EulerAncestralDiscreteScheduler`: beyond the next sigma, then back to it with fresh noise."""
    return _euler_schedule(spec, num_inference_steps, ancestral=True)


def _euler_schedule(spec: SchedulerSpec, num_inference_steps: int, *, ancestral: bool) -> Schedule:
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
