"""Our samplers beside diffusers' classes, step by step; run as a script it prints the errors as a table."""

from __future__ import annotations

from itertools import product

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)

from pocketfusion.runtime.samplers.linear_step import NoiseLevels
from pocketfusion.runtime.samplers.sampler import Sampler
from pocketfusion.runtime.specs import SAMPLERS, SchedulerSpec

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
PREDICTIONS = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
CLASSES = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "lcm": (LCMScheduler, {}),
    "tcd": (TCDScheduler, {}),
}
#: what says where a sampler ends, and its values
ENDS = {
    "ddim": ("set_alpha_to_one", (False, True)),
    "euler": ("final_sigmas_type", ("zero", "sigma_min")),
    "dpmpp-2m": ("final_sigmas_type", ("zero", "sigma_min")),
    "dpmpp-2m-karras": ("final_sigmas_type", ("zero", "sigma_min")),
    "lcm": ("set_alpha_to_one", (False, True)),
    "tcd": ("set_alpha_to_one", (False, True)),
}


def spec(**changes) -> SchedulerSpec:
    """Stable Diffusion's schedule, of epsilon and `leading` spacing, with changes."""
    settings = {"prediction_type": "epsilon", "timestep_spacing": "leading", "set_alpha_to_one": False}
    return SchedulerSpec(**{**STABLE_DIFFUSION, **settings, **changes})


def reference(name: str, **changes):
    """diffusers' scheduler of the same settings."""
    kind, more = CLASSES[name]
    settings = {**STABLE_DIFFUSION, "timestep_spacing": "leading", **more, **changes}
    if name in ("ddim", "lcm", "tcd"):
        settings.setdefault("set_alpha_to_one", False)
    return kind(**settings)


def ends(name: str) -> list[dict[str, object]]:
    """The settings of every end that the sampler can have."""
    if name not in ENDS:
        return [{}]
    key, values = ENDS[name]
    return [{key: value} for value in values]


class _Noise:
    """The same normal numbers for both sides: ours asks `draw`, diffusers' classes call `randn_tensor`."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype, self.drawn = shape, dtype, 0

    def at(self, k: int) -> np.ndarray:
        return np.random.default_rng([7, k]).standard_normal(self.shape).astype(self.dtype)


def errors(name: str, steps: int, monkeypatch, dtype: str = "float32", **changes) -> list[float]:
    """The largest difference after each step, relative to 1 or to diffusers' value where that is larger.

    Both run freely from the same noise; each step's output is the same for both, near the latents' own noise. With
    `float64` diffusers' tables, which it computes in float32, are replaced by float64 ones of the same values.
    """
    ours = Sampler(name, spec(**changes))
    eta = {"eta": changes.pop("eta")} if "eta" in changes else {}
    theirs = reference(name, **changes)
    timesteps = ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    np.testing.assert_array_equal(timesteps, theirs.timesteps.numpy()[:steps])
    if dtype == "float64":
        _in_float64(theirs, ours)
    shape = (1, 4, 4, 4)
    noise, generator = _Noise(shape, dtype), np.random.default_rng(0)
    module = __import__(type(theirs).__module__, fromlist=["randn_tensor"])
    step = {"k": 0}
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(noise.at(step["k"])))
    start = generator.standard_normal(shape).astype(dtype)
    sample = ours.start(start)
    expected = torch.from_numpy(start) * theirs.init_noise_sigma
    result = []
    for k, t in enumerate(theirs.timesteps[:steps]):
        step["k"] = k
        seen = theirs.scale_model_input(expected, t)
        output = generator.standard_normal(shape).astype(dtype)
        if changes.get("prediction_type", "epsilon") == "epsilon":  # a network's is near: keeps latents at unit scale
            sigma = np.sqrt(1 - theirs.alphas_cumprod[min(int(t), 999)].item())
            output = (0.1 * output + sigma * seen.numpy()).astype(dtype)
        expected = theirs.step(torch.from_numpy(output), t, expected, **eta).prev_sample
        sample = ours.step(output, k, sample, lambda k=k: noise.at(k))
        assert sample.dtype == dtype
        scale = 1.0
        if name.startswith("euler") and k + 1 < steps:  # diffusers' latents there have x_0 at weight 1
            scale = float(theirs.sigmas[k + 1] ** 2 + 1) ** 0.5
        there = expected.numpy()
        result.append(float(np.max(np.abs(scale * sample - there) / np.maximum(1, np.abs(there)))))
    return result


def _in_float64(theirs, ours: Sampler) -> None:
    precise = torch.from_numpy(NoiseLevels(ours.spec).alphas_cumprod)
    torch.testing.assert_close(theirs.alphas_cumprod.double(), precise, rtol=1e-5, atol=0)
    theirs.alphas_cumprod = precise
    if hasattr(theirs, "final_alpha_cumprod") and not ours.spec.set_alpha_to_one:
        theirs.final_alpha_cumprod = precise[0]
    if hasattr(theirs, "sigmas"):
        sigmas = torch.tensor([step.sigma / step.alpha for step in ours.schedule.steps], dtype=torch.float64)
        torch.testing.assert_close(theirs.sigmas[:-1].double(), sigmas, rtol=1e-5, atol=1e-6)
        final = ((1 - precise[0]) / precise[0]) ** 0.5 if theirs.sigmas[-1] > 0 else torch.zeros(())
        theirs.sigmas = torch.cat([sigmas, final.double()[None]])


if __name__ == "__main__":
    from pytest import MonkeyPatch

    counts = (1, 2, 4, 8, 25, 50)
    print(
        f"largest error of any step, of {', '.join(map(str, counts))} steps and of each end: float32 / float64 tables"
    )
    print("| sampler | prediction | " + " | ".join(SPACINGS) + " |\n|---|---|---|---|---|")
    for name, prediction in product(SAMPLERS, PREDICTIONS):
        row = []
        for spacing in SPACINGS:
            settings = {"prediction_type": prediction, "timestep_spacing": spacing}
            worst = {}
            for dtype in ("float32", "float64"):
                with MonkeyPatch.context() as patch:
                    every = [errors(name, n, patch, dtype, **settings, **end) for n in counts for end in ends(name)]
                worst[dtype] = max(map(max, every))
            row.append(" / ".join(f"{value:.1e}" for value in worst.values()))
        print(f"| `{name}` | {prediction} | " + " | ".join(row) + " |")
