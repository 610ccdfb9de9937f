"""The denoising loop: every form of UNet draws the picture that a plain loop in numpy draws."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.models.embeddings import get_timestep_embedding

import pocketfusion
from pocketfusion.runtime.denoise import Denoiser, NoiseStream, timestep_embedding
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.samplers.linear_step import NoiseLevels
from pocketfusion.runtime.samplers.sampler import Sampler
from pocketfusion.runtime.specs import MULTISTEP, SAMPLERS, TimeEmbedding

STEPS = 5


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


def by_hand(module, spec, latents, embeds, scale, steps):
    """Guided DDIM with the PyTorch network, in the textbook's form (x_0 and epsilon from v)."""
    import torch

    x = latents.astype(np.float64)
    n, alphas_cumprod = spec.num_train_timesteps, NoiseLevels(spec).alphas_cumprod
    for t in Sampler("ddim", spec).set_timesteps(steps):
        with torch.no_grad():
            rows = torch.from_numpy(np.repeat(x, 2, 0).astype(np.float32))
            (v,) = module(rows, torch.full((2,), float(t)), torch.from_numpy(embeds)).values()
        uncond, cond = v.numpy().astype(np.float64)
        v = uncond + scale * (cond - uncond)
        now, later = alphas_cumprod[t], alphas_cumprod[max(t - n // steps, 0)]
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
        spec, noise = pipeline.manifest.scheduler, pipeline.noise(3 + i)
        expected = by_hand(Plain().eval(), spec, noise, embeds, max(scale, 1), STEPS)
        np.testing.assert_allclose(seen[STEPS * (i + 1) - 1], expected, atol=2e-5)
        assert (np.asarray(pipeline.decode(seen[STEPS * (i + 1) - 1])) == np.asarray(result.images[i])).all()
    pipeline.close()


@pytest.mark.parametrize("form", ["plain", "single", "outside", "folded"])
@pytest.mark.parametrize("mode", ["resident", "pipelined"])
def test_predictions_are_the_networks_own_in_every_form(forms, form, mode):
    import torch
    from small_unet import Plain

    pipeline = Pipeline.load(forms[form], 1, mode=mode)
    embeds = np.concatenate([pipeline.encode(text) for text in ("", "a red apple")])
    latents = pipeline.noise(3)
    before = pipeline.generate("a red apple", seed=3, num_inference_steps=2).images[0]
    predictions = pipeline.predict(latents, 500.0, embeds, 4.0)
    with torch.no_grad():
        rows = torch.from_numpy(np.repeat(latents, 2, 0))
        (expected,) = Plain().eval()(rows, torch.full((2,), 500.0), torch.from_numpy(embeds)).values()
    np.testing.assert_allclose(predictions, expected.numpy(), atol=2e-5)
    assert pipeline.generate("a red apple", seed=3, num_inference_steps=2).images[0] == before
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
    sampler = Sampler("ddim", pipeline.manifest.scheduler)
    sampler.set_timesteps(2)
    with pipeline._networks.use("unet") as unet:
        denoiser = Denoiser(unet, pipeline.manifest, sampler, embeds, scale)
        denoiser.start(pipeline.noise(0), NoiseStream(0, 8, 8, 4))
        denoiser.step(0)
        calls = {"write": [], "run": []}
        write, run = Network.write, Network.run
        monkeypatch.setattr(Network, "write", lambda self, **v: (calls["write"].extend(v), write(self, **v))[1])
        monkeypatch.setattr(Network, "run", lambda self: (calls["run"].append(1), run(self))[1])
        denoiser.step(1)
    assert sorted(calls["write"]) == sorted(written) and len(calls["run"]) == runs


def test_a_huge_scale_is_told_by_the_folded_form_too(forms):
    with pytest.raises(pocketfusion.errors.PocketfusionError, match="produced (infinity|NaN) at step 1 of 2"):
        pocketfusion.load(forms["folded"], num_threads=1).generate("cat", num_inference_steps=2, guidance_scale=1e300)


def by_diffusers(module, name, stream, embeds, scale, steps, monkeypatch):
    """The latents after every step of diffusers' class, with the PyTorch network and the stream's noise; NHWC."""
    import torch
    from stepwise import reference

    scheduler = reference(name, prediction_type="v_prediction", timestep_spacing="trailing")
    library = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    monkeypatch.setattr(library, "randn_tensor", lambda *_, **__: torch.from_numpy(stream.draw()[None]))
    scheduler.set_timesteps(steps)
    x, after = torch.from_numpy(stream.draw()[None]) * scheduler.init_noise_sigma, []
    for k, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            rows = scheduler.scale_model_input(x, t).repeat(2, 1, 1, 1)
            (v,) = module(rows, torch.full((2,), float(t)), torch.from_numpy(embeds)).values()
        uncond, cond = v.split(1)
        x = scheduler.step(uncond + scale * (cond - uncond), t, x).prev_sample
        weight = float(scheduler.sigmas[k + 1] ** 2 + 1) ** 0.5 if name.startswith("euler") and k + 1 < steps else 1.0
        after.append(x.numpy() / weight)
    return after


@pytest.mark.parametrize("form", ["plain", "single", "folded"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws_what_diffusers_draws(forms, monkeypatch, form, name):
    from small_unet import Plain

    pipeline = Pipeline.load(forms[form], 1)
    given = {"num_images": 2, "num_inference_steps": STEPS, "guidance_scale": 2.0, "sampler": name}
    if form == "folded" and name in MULTISTEP:
        with pytest.raises(
            pocketfusion.errors.PocketfusionError, match="needs the UNet's own prediction.*choose ddim"
        ):
            pipeline.generate("a red apple", seed=3, **given)
        return
    seen = []
    result = pipeline.generate("a red apple", seed=3, callback=lambda k, t, z: seen.append(z.copy()), **given)
    assert result.sampler == name
    embeds = np.concatenate([pipeline.encode(text) for text in ("", "a red apple")])
    for i in range(2):  # the second picture has noise of its own, and none of the first's memory
        stream = NoiseStream(3 + i, 8, 8, 4)
        expected = by_diffusers(Plain().eval(), name, stream, embeds, 2.0, STEPS, monkeypatch)
        np.testing.assert_allclose(seen[STEPS * i : STEPS * (i + 1)], expected, atol=5e-5)
    # the starting noise given as latents leaves the noise of the steps as it was
    latents = np.concatenate([pipeline.noise(3 + i) for i in range(2)])
    again = pipeline.generate("a red apple", seed=3, latents=latents, **given)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(result.images, again.images, strict=True))
    assert again.seeds == ([3, 4] if name in ("euler-ancestral", "lcm", "tcd") else [])
    pipeline.close()


def test_timesteps_between_whole_ones_reach_the_unet_and_the_callback(forms, monkeypatch):
    pipeline = Pipeline.load(forms["plain"], 1)
    spaced = pipeline.manifest.scheduler.model_copy(update={"timestep_spacing": "linspace"})
    monkeypatch.setattr(pipeline, "manifest", pipeline.manifest.model_copy(update={"scheduler": spaced}))
    written, seen, write = [], [], Network.write
    monkeypatch.setattr(
        Network, "write", lambda self, **v: (written.extend(v.get("timestep", [])[:1]), write(self, **v))[1]
    )
    pipeline.generate("cat", num_inference_steps=3, sampler="euler", callback=lambda k, t, z: seen.append(t))
    assert written == seen == [999.0, 499.5, 0.0]


def test_samplers_that_a_bundle_may_be_drawn_with(forms):
    folded, plain = (Bundle.open(forms[form]).manifest for form in ("folded", "plain"))
    assert plain.allowed_samplers == SAMPLERS
    assert folded.allowed_samplers == tuple(name for name in SAMPLERS if name not in MULTISTEP)
    taught = plain.model_copy(update={"samplers": ["ddim", "lcm"]})
    assert taught.allowed_samplers == ("ddim", "lcm")
