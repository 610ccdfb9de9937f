"""DDIM sampling (Song et al., arXiv 2010.02502, eq. 12, eta = 0) in numpy, as `diffusers.DDIMScheduler` does it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import SchedulerSpec

Array = npt.NDArray[np.float32]


def trailing_timesteps(num_inference_steps: int, num_train_timesteps: int) -> npt.NDArray[np.int64]:
    """T − k T/N − 1 for k = 0 … N − 1, rounded: [num_inference_steps] int64, falling from T − 1."""
    # arange, as diffusers has it: its own rounding decides where a timestep falls halfway (48 steps: 937.5)
    falling = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_inference_steps)[:num_inference_steps]
    return np.round(falling).astype(np.int64) - 1


class DDIMScheduler:
    """Deterministic DDIM steps for epsilon- and v-prediction (v: Salimans & Ho, arXiv 2202.00512, appendix D).

    Tables are float64, latents float32. `timesteps` holds the integer timesteps of the last `set_timesteps`, falling.
    """

    def __init__(self, spec: SchedulerSpec) -> None:
        self.spec = spec
        n = spec.num_train_timesteps
        if spec.beta_schedule == "linear":
            betas = np.linspace(spec.beta_start, spec.beta_end, n)
        else:
            betas = np.linspace(spec.beta_start**0.5, spec.beta_end**0.5, n) ** 2
        self.alphas_cumprod = np.cumprod(1.0 - betas)
        self.final_alpha_cumprod = 1.0 if spec.set_alpha_to_one else float(self.alphas_cumprod[0])
        self.timesteps = np.empty(0, np.int64)

    def set_timesteps(self, num_inference_steps: int) -> npt.NDArray[np.int64]:
        """Chooses `num_inference_steps` timesteps, [num_inference_steps] int64 (spacings: arXiv 2305.08891, table 2).

        Departs from diffusers where that fails: its `leading` spacing with `num_train_timesteps` steps and an offset
        begins beyond the table (here the offset shrinks to what fits), and its `trailing` spacing rounds to one step
        too many, at timestep -1, for some counts (61 is one; here the last is dropped).
        Raises PocketfusionError unless 1 <= num_inference_steps <= num_train_timesteps.
        """
        n = self.spec.num_train_timesteps
        if not 1 <= num_inference_steps <= n:
            raise PocketfusionError(f"the number of steps is {num_inference_steps}: choose 1 to {n}")
        if self.spec.timestep_spacing == "leading":
            timesteps = np.arange(num_inference_steps)[::-1] * (n // num_inference_steps)
            self.timesteps = timesteps + min(self.spec.steps_offset, n - 1 - int(timesteps[0]))
        else:
            self.timesteps = trailing_timesteps(num_inference_steps, n)
        return self.timesteps

    def coefficients(self, timestep: int) -> tuple[float, float]:
        """(a, b) of the step from x_t to x_(t - N/steps): x_(t - N/steps) = a x_t + b model_output.

        Both predictions are linear in x_t and the output, so DDIM's x_0 and epsilon need not be formed. With alpha,
        sigma at t and alpha', sigma' after it: epsilon has a = alpha'/alpha, b = sigma' - alpha' sigma / alpha; v has
        a = alpha alpha' + sigma sigma', b = alpha sigma' - sigma alpha'.
        """
        previous = timestep - self.spec.num_train_timesteps // len(self.timesteps)
        alpha_bar = float(self.alphas_cumprod[timestep])
        alpha_bar_prev = float(self.alphas_cumprod[previous]) if previous >= 0 else self.final_alpha_cumprod
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        alpha_prev, sigma_prev = alpha_bar_prev**0.5, (1 - alpha_bar_prev) ** 0.5
        if self.spec.prediction_type == "epsilon":
            return alpha_prev / alpha, sigma_prev - alpha_prev * sigma / alpha
        return alpha * alpha_prev + sigma * sigma_prev, alpha * sigma_prev - sigma * alpha_prev

    def step(self, model_output: Array, timestep: int, sample: Array) -> Array:
        """One step from x_t to x_(t - N/steps): all arrays of one shape, float32."""
        a, b = self.coefficients(timestep)
        return np.float32(a) * sample + np.float32(b) * model_output
