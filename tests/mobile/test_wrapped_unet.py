"""The UNet wrapper's options: the time embedding computed outside, the scheduler's step inside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import pipeline_specs
from pocketfusion.mobile.wrappers import time_embedding_spec, wrap
from tiny import tiny_pipeline


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = tiny_pipeline()
    torch.manual_seed(1)
    for parameter in made.unet.parameters():  # fresh UNets end in near-zero predictions
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return made


@torch.no_grad()
@pytest.mark.parametrize("timestep", [0.0, 500.0, 999.0])
def test_embedding_outside_equals_inside(pipeline: Any, timestep: float) -> None:
    inputs = pipeline_specs.samples(pipeline, 2)["unet"] | {"timestep": torch.full((2,), timestep)}
    inside = wrap(pipeline)["unet"](**inputs)["noise_pred"]
    del inputs["timestep"]
    embedding = pipeline.unet.time_proj(torch.full((2,), timestep))
    outside = wrap(pipeline, time_embedding="outside")["unet"](**inputs, timestep_embedding=embedding)["noise_pred"]
    torch.testing.assert_close(outside, inside, rtol=0, atol=1e-6)
    assert inside.std() > 1e-3
    # the pipeline's own UNet still takes timesteps
    again = pipeline.unet(torch.randn(1, 4, 8, 8), timestep, torch.randn(1, 32, 32)).sample
    assert again.shape == (1, 4, 8, 8)


def test_the_specs_say_how_to_compute_the_embedding(pipeline: Any) -> None:
    spec = time_embedding_spec(pipeline.unet)
    given = pipeline_specs.samples(pipeline, 2, time_embedding="outside")["unet"]
    assert "timestep" not in given and given["timestep_embedding"].shape == (2, spec.dim)
    half = spec.dim // 2
    # by hand: cosines first, frequencies from 1 to 1/10000 exclusive
    angles = 500.0 * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - spec.downscale_freq_shift))
    assert spec.flip_sin_to_cos
    expected = torch.cat([angles.cos(), angles.sin()])
    torch.testing.assert_close(given["timestep_embedding"][0].double(), expected, rtol=0, atol=1e-4)


def test_fourier_embeddings_stay_inside(pipeline: Any) -> None:
    pipeline.unet.register_to_config(time_embedding_type="fourier")
    try:
        with pytest.raises(PocketfusionError, match="'fourier': only a positional one"):
            wrap(pipeline, time_embedding="outside")
    finally:
        pipeline.unet.register_to_config(time_embedding_type="positional")


@torch.no_grad()
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("batch", [1, 2])
def test_folded_step_equals_diffusers(pipeline: Any, prediction_type: str, batch: int) -> None:
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    scheduler.set_timesteps(8)
    options = {"time_embedding": "outside", "scheduler_step": True}
    folded, plain = wrap(pipeline, **options)["unet"], wrap(pipeline)["unet"]
    inputs = pipeline_specs.samples(pipeline, batch, **options)["unet"]
    assert inputs["sample"].shape[0] == 1 and inputs["encoder_hidden_states"].shape[0] == batch
    scale = 4.0
    for timestep in scheduler.timesteps[[0, 3, 7]]:
        t, before = int(timestep), int(timestep) - 1000 // 8
        alphas = scheduler.alphas_cumprod
        alpha, sigma = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        last = alphas[before] if before >= 0 else scheduler.final_alpha_cumprod
        alpha_, sigma_ = last.sqrt(), (1 - last).sqrt()
        if prediction_type == "epsilon":
            a, b = alpha_ / alpha, sigma_ - alpha_ * sigma / alpha
        else:
            a, b = alpha_ * alpha + sigma_ * sigma, sigma_ * alpha - alpha_ * sigma
        inputs["step_coefficients"] = torch.tensor([[scale, float(a), float(b)]])
        inputs["timestep_embedding"] = pipeline.unet.time_proj(torch.full((batch,), float(t)))
        got = folded(**inputs)["prev_sample"]

        sample = inputs["sample"]
        prediction = plain(
            sample=sample.repeat(batch, 1, 1, 1),
            timestep=torch.full((batch,), float(t)),
            encoder_hidden_states=inputs["encoder_hidden_states"],
        )["noise_pred"]
        guided = prediction if batch == 1 else prediction[:1] + scale * (prediction[1:] - prediction[:1])
        expected = scheduler.step(guided, t, sample).prev_sample
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6 * float(expected.abs().max()) + 1e-6)
