"""Sampling: the text's keys and values are made once a batch, exactly, and no step is taken beyond the last."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention

from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.models.guided import guided_prediction, noise_batch, sample_latents
from pocketfusion.runtime.manifest import SchedulerSpec
from pocketfusion.runtime.samplers.sampler import Sampler


@pytest.fixture(scope="module")
def unet(tiny_folder):
    return load_elastic(tiny_folder).eval()


@pytest.fixture(scope="module")
def scheduler(tiny_folder):
    return DDIMScheduler.from_pretrained(tiny_folder, subfolder="scheduler")


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_keys_and_values_are_made_once_a_batch_and_exactly(unet, scheduler, scale):
    layers = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    before, calls = dict(unet.named_modules()), []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for m in layers for layer in (m.to_k, m.to_v)]
    generator = torch.Generator().manual_seed(0)
    states, null = torch.randn(2, 2, 32, 32, generator=generator)
    noise = noise_batch([3, 4], (4, 8, 8))
    for given in (states, states + 1):  # a second batch is not answered with the first one's
        calls.clear()
        found = sample_latents(unet, scheduler, noise, given, null, num_inference_steps=5, guidance_scale=scale)
        assert len(calls) == 2 * len(layers)
        z = noise
        for t in scheduler.timesteps:
            with torch.no_grad():
                v = guided_prediction(unet, z, t, given, null, torch.full((2,), scale))
            z = scheduler.step(v, t, z).prev_sample
        assert torch.equal(found, z) and len(calls) == 2 * len(layers) * 6
    for hook in hooks:
        hook.remove()
    assert dict(unet.named_modules()) == before


class Linear(torch.nn.Module):
    """A network whose v is a tenth of z_t, and that says when it was asked."""

    def __init__(self):
        super().__init__()
        self.asked: list[int] = []

    def forward(self, z_t, timesteps, states):
        self.asked.append(int(timesteps[0]))
        return type("Output", (), {"sample": z_t / 10})()


@pytest.mark.parametrize("steps", [16, 48, 61])  # at 61 diffusers' own list has a 62nd timestep, -1
def test_it_draws_what_the_runtime_draws(scheduler, steps):
    net, noise, states = Linear(), noise_batch([3], (4, 8, 8)), torch.zeros(1, 2, 2)
    found = sample_latents(net, scheduler, noise, states, states, num_inference_steps=steps, guidance_scale=1.0)
    spec = {key: value for key, value in scheduler.config.items() if key in SchedulerSpec.model_fields}
    runtime, z = Sampler("ddim", SchedulerSpec(**spec)), noise.numpy()
    assert net.asked == runtime.set_timesteps(steps).tolist()
    for k in range(steps):
        z = runtime.step(z / 10, k, z, noise=noise.numpy)
    np.testing.assert_allclose(found.numpy(), z, rtol=1e-4, atol=1e-5)
