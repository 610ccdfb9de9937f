"""DDIM in numpy: by hand, and step by step against diffusers."""

from __future__ import annotations

import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import SchedulerSpec
from pocketfusion.runtime.scheduler import DDIMScheduler

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def spec(**changes) -> SchedulerSpec:
    settings = {"prediction_type": "epsilon", "timestep_spacing": "leading", **STABLE_DIFFUSION, **changes}
    return SchedulerSpec(**settings)


def test_two_steps_by_hand():
    # betas 0.1, 0.2: alphas_cumprod 0.9, 0.72
    tiny = {"num_train_timesteps": 2, "beta_start": 0.1, "beta_end": 0.2, "beta_schedule": "linear", "steps_offset": 0}
    one, half = np.ones(1, np.float32), np.full(1, 0.5, np.float32)

    scheduler = DDIMScheduler(spec(**tiny))
    np.testing.assert_allclose(scheduler.alphas_cumprod, [0.9, 0.72])
    assert scheduler.set_timesteps(2).tolist() == [1, 0]
    x = scheduler.step(half, 1, one)
    assert x.dtype == np.float32
    # x_0 = (1 - sqrt(.28) / 2) / sqrt(.72) = 0.866707; sqrt(.9) x_0 + sqrt(.1) / 2
    np.testing.assert_allclose(x, 0.980344, atol=1e-6)
    # the last step ends at alphas_cumprod[0], so with epsilon it changes nothing
    np.testing.assert_allclose(scheduler.step(half, 0, x), x, atol=1e-6)

    to_one = DDIMScheduler(spec(**tiny, prediction_type="v_prediction").model_copy(update={"set_alpha_to_one": True}))
    to_one.set_timesteps(2)
    # x_0 = sqrt(.72) - sqrt(.28) / 2 = 0.583953; epsilon = sqrt(.72) / 2 + sqrt(.28) = 0.953414
    np.testing.assert_allclose(to_one.step(half, 1, one), 0.855482, atol=1e-6)
    # ends at x_0 = sqrt(.9) - sqrt(.1) / 2
    np.testing.assert_allclose(to_one.step(half, 0, one), 0.790569, atol=1e-6)


def test_timesteps_by_hand():
    leading, trailing = DDIMScheduler(spec()), DDIMScheduler(spec(timestep_spacing="trailing"))
    assert leading.set_timesteps(4).tolist() == [751, 501, 251, 1]
    assert trailing.set_timesteps(4).tolist() == [999, 749, 499, 249]
    assert leading.set_timesteps(1).tolist() == [1]
    assert trailing.set_timesteps(1).tolist() == [999]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_timesteps_equal_diffusers_for_every_step_count(spacing):
    from diffusers import DDIMScheduler as Reference

    ours = DDIMScheduler(spec(timestep_spacing=spacing))
    theirs = Reference(timestep_spacing=spacing, **STABLE_DIFFUSION)
    for n in range(1, 1001):
        timesteps = ours.set_timesteps(n)
        assert len(timesteps) == n and timesteps.min() >= 0 and timesteps.max() <= 999
        assert (np.diff(timesteps) < 0).all()
        theirs.set_timesteps(n)
        if (n, spacing) != (1000, "leading"):  # diffusers then begins at 1000, beyond its own table
            assert timesteps.tolist() == theirs.timesteps.tolist()[:n]
            assert set(theirs.timesteps.tolist()[n:]) <= {-1}  # and for some n adds a step at -1


@pytest.mark.parametrize("steps", [7, 10, 25, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [False, True])
def test_every_step_equals_diffusers(prediction, spacing, steps, to_one):
    import torch
    from diffusers import DDIMScheduler as Reference

    settings = {**STABLE_DIFFUSION, "set_alpha_to_one": to_one}
    ours = DDIMScheduler(spec(prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=to_one))
    theirs = Reference(prediction_type=prediction, timestep_spacing=spacing, clip_sample=False, **settings)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    generator = np.random.default_rng(0)
    sample = generator.standard_normal((1, 8, 8, 4), np.float32)
    reference = torch.from_numpy(sample)
    for t in ours.timesteps:
        output = generator.standard_normal(sample.shape, np.float32)
        if prediction == "epsilon":  # near the sample's own noise, as a network's is: keeps the latents at unit scale
            output = (0.1 * output + np.sqrt(1 - ours.alphas_cumprod[t]) * reference.numpy()).astype(np.float32)
        expected = theirs.step(torch.from_numpy(output), int(t), reference).prev_sample
        sample = ours.step(output, int(t), sample)
        np.testing.assert_allclose(sample, expected.numpy(), rtol=1e-5, atol=1e-5)
        reference = expected


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_count_out_of_range(steps):
    with pytest.raises(PocketfusionError, match=f"number of steps is {steps}: choose 1 to 1000"):
        DDIMScheduler(spec()).set_timesteps(steps)
