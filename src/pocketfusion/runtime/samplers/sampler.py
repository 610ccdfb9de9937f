"""The samplers by name, and what runs them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Manifest
from pocketfusion.runtime.samplers.linear_step import Schedule
from pocketfusion.runtime.samplers.solvers import ddim, dpmpp_2m, dpmpp_2m_karras, euler, euler_ancestral, lcm, tcd
from pocketfusion.runtime.specs import SAMPLERS, SamplerName, SchedulerSpec, most_steps

Array = npt.NDArray[np.float32]

_SCHEDULES: dict[SamplerName, Callable[[SchedulerSpec, int], Schedule]] = {
    "ddim": ddim,
    "euler": euler,
    "euler-ancestral": euler_ancestral,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-2m-karras": dpmpp_2m_karras,
    "lcm": lcm,
    "tcd": tcd,
}


class Sampler:
    """Draws one picture after the other: `set_timesteps`, then for each `start` and a `step` for every timestep.

    Tables are float64; latents keep their type, float32. `timesteps` are those of the last `set_timesteps`, falling.
    """

    def __init__(self, name: SamplerName, spec: SchedulerSpec) -> None:
        self.name, self.spec = name, spec
        self.schedule = Schedule(np.empty(0, np.int64), [])
        self._previous: Array | None = None  # x_0 of the step before, where the next one asks for it

    @property
    def timesteps(self) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        """What the UNet is given at each step, [N]: whole numbers, but for Euler's `linspace` spacing."""
        return self.schedule.timesteps

    @property
    def adds_noise(self) -> bool:
        """If a step adds noise, so that the starting latents alone do not make the picture."""
        return any(step.noise for step in self.schedule.steps)

    def set_timesteps(self, num_inference_steps: int) -> npt.NDArray[np.int64] | npt.NDArray[np.float64]:
        """Chooses the timesteps; raises PocketfusionError for a number of steps that the sampler does not have."""
        most = most_steps(self.name, self.spec)
        if not 1 <= num_inference_steps <= most:
            raise PocketfusionError(
                f"the number of steps is {num_inference_steps}: choose 1 to {most}"
                f"{'' if self.name == 'ddim' else f' with {self.name}'}"
            )
        self.schedule = _SCHEDULES[self.name](self.spec, num_inference_steps)
        return self.timesteps

    def start(self, latents: Array) -> Array:
        """The latents of the first step from standard normal ones, of any shape."""
        self._previous = None
        return latents * latents.dtype.type(self.schedule.initial_scale)

    def coefficients(self, k: int) -> tuple[float, float]:
        """(a, b) of step k (from 0): the next latents are a x + b model_output, and what `add_noise` adds."""
        return self.schedule.steps[k].coefficients(self.spec.prediction_type)

    def add_noise(self, k: int, latents: Array, noise: Callable[[], Array]) -> Array:
        """The latents of step k with its share of fresh noise, which is asked for only if it has one."""
        share = self.schedule.steps[k].noise
        return latents + latents.dtype.type(share) * noise() if share else latents

    def step(self, model_output: Array, k: int, sample: Array, noise: Callable[[], Array]) -> Array:
        """Step k (from 0) from the latents `sample`; all arrays of one shape. Steps must follow each other."""
        real, step = sample.dtype.type, self.schedule.steps[k]
        a, b = self.coefficients(k)
        latents: Array = real(a) * sample + real(b) * model_output
        if step.previous_x_0 and self._previous is not None:
            latents += real(step.previous_x_0) * self._previous
        if k + 1 < len(self.timesteps) and self.schedule.steps[k + 1].previous_x_0:
            if self.spec.prediction_type == "epsilon":
                self._previous = (sample - real(step.sigma) * model_output) / real(step.alpha)
            else:
                self._previous = real(step.alpha) * sample - real(step.sigma) * model_output
        return self.add_noise(k, latents, noise)


def resolve_sampler(manifest: Manifest, name: str | None, eta: float | None = None) -> Sampler:
    """The bundle's own sampler, or the one called `name`, with TCD's `eta` if not the bundle's.

    Raises PocketfusionError for a sampler that the bundle does not allow, and an eta that is none or has no sampler.
    """
    allowed = manifest.allowed_samplers
    for sampler in allowed:
        if sampler == (manifest.sampler if name is None else name):
            return Sampler(sampler, with_eta(manifest.scheduler, sampler, eta))
    if name not in SAMPLERS:
        why = "is not known"
    elif manifest.samplers is not None and name not in manifest.samplers:
        why = "has timesteps that this bundle's UNet was not taught"
    else:
        why = "needs the UNet's own prediction, which this bundle's UNet with the step in its graph does not give"
    raise PocketfusionError(f"the sampler {name!a} {why}: choose {' or '.join(allowed)}")


def with_eta(spec: SchedulerSpec, sampler: SamplerName, eta: float | None) -> SchedulerSpec:
    """`spec` with TCD's `eta` if one is given; PocketfusionError for one that is none, or of another sampler."""
    if eta is None:
        return spec
    if sampler != "tcd":
        raise PocketfusionError(f"eta is {eta:g}, but the sampler is {sampler}: it is of tcd, leave it out")
    if not 0 <= eta <= 1:
        raise PocketfusionError(f"eta is {eta:g}: choose 0 (no noise between the steps) to 1 (all of it)")
    return spec.model_copy(update={"eta": float(eta)})
