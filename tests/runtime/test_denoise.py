"""The denoising loop: every form of UNet draws the picture that a plain loop in numpy draws."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.models.embeddings import get_timestep_embedding

import pocketfusion
from pocketfusion.runtime.denoise import Denoiser
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.specs import TimeEmbedding
from pocketfusion.runtime.time_embedding import timestep_embedding

STEPS = 5


@pytest.fixture(scope="module")
def forms(tiny_bundle, tmp_path_factory):
    from small_unet import make_bundles

    return make_bundles(tiny_bundle, tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("dim", [16, 17, 320])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_time_embedding_is_diffusers(dim, flip, shift):
    import torch

    spec = TimeEmbedding(dim=dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    for t in (0, 1, 500, 981, 999):
        expected = get_timestep_embedding(torch.tensor([t]), dim, flip, shift).numpy()
        # an angle near 1000 in float32 is only known to 6e-5, and both libraries' exp differ in their last bit
        np.testing.assert_allclose(timestep_embedding(t, spec), expected, atol=1.5e-4)
    np.testing.assert_allclose(
        timestep_embedding(1, spec), get_timestep_embedding(torch.tensor([1]), dim, flip, shift), atol=1e-6
    )


def by_hand(module, scheduler, latents, embeds, scale, steps):
    """Guided DDIM with the PyTorch network, in the textbook's form (x_0 and epsilon from v)."""
    import torch

    x = latents.astype(np.float64)
    n = scheduler.spec.num_train_timesteps
    for t in scheduler.set_timesteps(steps):
        with torch.no_grad():
            rows = torch.from_numpy(np.repeat(x, 2, 0).astype(np.float32))
            (v,) = module(rows, torch.full((2,), float(t)), torch.from_numpy(embeds)).values()
        uncond, cond = v.numpy().astype(np.float64)
        v = uncond + scale * (cond - uncond)
        now = scheduler.alphas_cumprod[t]
        later = scheduler.alphas_cumprod[t - n // steps] if t >= n // steps else scheduler.final_alpha_cumprod
        x_0, epsilon = now**0.5 * x - (1 - now) ** 0.5 * v, now**0.5 * v + (1 - now) ** 0.5 * x
        x = later**0.5 * x_0 + (1 - later) ** 0.5 * epsilon
    return x


@pytest.mark.parametrize("form", ["plain", "single", "outside", "folded"])
@pytest.mark.parametrize("mode", ["resident", "pipelined"])  # the two engines
@pytest.mark.parametrize("scale", [0.0, 4.0])  # at and below 1 the prompt alone is drawn, as in diffusers
def test_every_form_draws_what_a_plain_loop_draws(forms, form, mode, scale):
    from small_unet import Plain

    pipeline = Pipeline.load(forms[form], 1, mode=mode)
    seen = []
    result = pipeline.generate(
        "a red apple",
        seed=3,
        num_images=2,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        callback=lambda k, t, latents: seen.append(latents.copy()),
    )
    embeds = np.concatenate([pipeline.encode(text) for text in ("", "a red apple")])
    for i in range(2):  # the second picture starts afresh from its own noise
        expected = by_hand(Plain().eval(), pipeline.scheduler, pipeline.noise(3 + i), embeds, max(scale, 1), STEPS)
        np.testing.assert_allclose(seen[STEPS * (i + 1) - 1], expected, atol=2e-5)
        assert (np.asarray(pipeline.decode(seen[STEPS * (i + 1) - 1])) == np.asarray(result.images[i])).all()
    pipeline.close()


@pytest.mark.parametrize(
    ("form", "scale", "written", "runs"),
    [
        ("plain", 4.0, ["sample", "timestep"], 1),
        ("single", 4.0, ["sample", "timestep", "encoder_hidden_states", "encoder_hidden_states"], 2),
        ("single", 1.0, ["sample", "timestep"], 1),
        ("single", 0.0, ["sample", "timestep"], 1),
        ("folded", 4.0, ["timestep_embedding", "step_coefficients"], 1),
    ],
)
def test_a_step_writes_no_more_than_changes(forms, monkeypatch, form, scale, written, runs):
    pipeline = Pipeline.load(forms[form], 1, mode="pipelined")
    embeds = np.concatenate([pipeline.encode(text) for text in ("", "cat")])
    timesteps = pipeline.scheduler.set_timesteps(2)
    with pipeline._networks.use("unet") as unet:
        denoiser = Denoiser(unet, pipeline.manifest, pipeline.scheduler, embeds, scale)
        denoiser.start(pipeline.noise(0))
        denoiser.step(int(timesteps[0]))
        calls = {"write": [], "run": []}
        write, run = Network.write, Network.run
        monkeypatch.setattr(Network, "write", lambda self, **v: (calls["write"].extend(v), write(self, **v))[1])
        monkeypatch.setattr(Network, "run", lambda self: (calls["run"].append(1), run(self))[1])
        denoiser.step(int(timesteps[1]))
    assert sorted(calls["write"]) == sorted(written) and len(calls["run"]) == runs


def test_a_huge_scale_is_told_by_the_folded_form_too(forms):
    with pytest.raises(pocketfusion.errors.PocketfusionError, match="produced (infinity|NaN) at step 1 of 2"):
        pocketfusion.load(forms["folded"], num_threads=1).generate("cat", num_inference_steps=2, guidance_scale=1e300)
