"""The model inside the package and the folder it was exported from."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pocketfusion
from pocketfusion.artefact import sha256_file
from pocketfusion.evaluate.generate import ModelFolder, SamplerSettings
from pocketfusion.folder import folder_hash
from pocketfusion.latency.table import LatencyTable
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.models.sampling import Sampling, read_sampling
from pocketfusion.models.slim_autoencoder import SlimAutoencoderKL, load_vae
from pocketfusion.runtime.manifest import embedded_bundle

ROOT = Path(__file__).parents[1]
BASE, JUDGE = ROOT / "models" / "emoji" / "base", ROOT / "models" / "emoji" / "judge"
EMBEDDED = ROOT / "models" / "emoji" / "eight"  #: the base distilled to eight steps
PROMPT, SEED = "a red apple, noto style", 3
GOLDEN = Path(__file__).parent / "golden" / "apple.png"


def psnr(a, b) -> float:
    mse = np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)
    return 10 * math.log10(255**2 / max(mse, 1e-9))


@pytest.fixture(scope="module")
def pipeline():
    return pocketfusion.load()


@pytest.fixture(scope="module")
def stock():
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(EMBEDDED, torch_dtype=torch.float32, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_fits(pipeline):
    assert sum(p.stat().st_size for p in Path(embedded_bundle()).rglob("*") if p.is_file()) <= 40e6


def test_it_was_exported_from_the_committed_folder(pipeline):
    assert pipeline.manifest.provenance["model_folder"] == folder_hash(EMBEDDED)
    sampling, defaults = read_sampling(EMBEDDED), pipeline.manifest.defaults
    assert sampling.num_inference_steps == defaults.num_inference_steps == 8


def test_trained_weights_stay_small():
    folders = [BASE.with_name(name) for name in ("base", "judge", "evolved", "eight", "final")]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    # equal files, such as the text encoder, are one object in the repository
    assert sum({sha256_file(p): p.stat().st_size for p in files}.values()) < 130e6


def test_same_seed_same_bytes_and_the_golden_picture(pipeline):
    first, second = (pipeline.generate(PROMPT, seed=SEED).images[0] for _ in range(2))
    assert first.tobytes() == second.tobytes()
    # another processor may round otherwise; a changed sampler or bundle draws something else
    assert psnr(first, Image.open(GOLDEN)) > 30


def test_the_prompt_matters(pipeline):
    apple, contrast = (
        np.asarray(pipeline.generate(prompt, seed=SEED).images[0], float)
        for prompt in (PROMPT, "a cat, fluent contrast style")
    )
    red = apple[..., 0] - apple[..., 1:].mean(-1)
    assert red.max() > 100  # red somewhere
    saturation = contrast.max(-1) - contrast.min(-1)
    assert np.median(saturation) < 30  # black and white


def test_the_folder_draws_the_same_in_stock_diffusers(stock):
    from diffusers import DDIMScheduler

    from pocketfusion.models.guided import noise_batch, sample_images
    from pocketfusion.models.text_encoder import TextEncoder

    text = TextEncoder(stock.text_encoder, stock.tokenizer)
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    ours = sample_images(
        stock.unet, stock.vae, text, scheduler, [PROMPT], [SEED], num_inference_steps=10, guidance_scale=4.0
    )
    config = stock.unet.config
    noise = noise_batch([SEED], (config.in_channels, config.sample_size, config.sample_size))
    theirs = stock(PROMPT, latents=noise, num_inference_steps=10, guidance_scale=4.0, output_type="pil").images[0]
    assert psnr(ours[0], theirs) >= 40


def test_the_bundle_draws_what_the_folder_draws(pipeline, stock):
    """8-bit weights move details, not the picture."""
    from pocketfusion.models.guided import noise_batch

    config = stock.unet.config
    noise = noise_batch([SEED], (config.in_channels, config.sample_size, config.sample_size))
    settings = pipeline.manifest.defaults.model_dump()
    theirs = stock(PROMPT, latents=noise, output_type="pil", **settings).images[0]
    ours = pipeline.generate(PROMPT, seed=SEED).images[0]
    assert psnr(ours, theirs) > 20


def test_the_evolved_model_is_what_its_card_says():
    """Half of the base's latency by the committed table, the base's other networks, and it draws."""
    evolved, table = ROOT / "models" / "emoji" / "evolved", ROOT / "models" / "emoji" / "base-latency.json"
    unet = load_elastic(evolved)
    predict = partial(LatencyTable.load(table).predict, unet.config)
    assert predict(unet.architecture) <= 0.5 * predict(Architecture.stock(unet.config))
    assert len(unet.architecture.names()) == 14
    for part in ("vae", "text_encoder", "tokenizer"):
        assert folder_hash(evolved / part) == folder_hash(BASE / part)
    system = ModelFolder(evolved)
    image = system.draw(["a red apple, noto style"], [3], SamplerSettings(10, 4.5))[0].astype(int)
    middle = image[16:48, 16:48].mean((0, 1))
    assert middle[0] > 1.5 * max(middle[1], middle[2])  # red


def test_the_final_model_is_evolved_eight_steps_and_a_small_decoder():
    final = BASE.with_name("final")
    assert read_sampling(final) == Sampling(num_inference_steps=8, guidance_scale=4.5)
    small, whole = load_vae(final / "vae"), load_vae(BASE / "vae")
    assert isinstance(small, SlimAutoencoderKL)
    count = [sum(p.numel() for p in vae.decoder.parameters()) for vae in (small, whole)]
    assert count[0] < count[1] / 3.8
    for name, weight in whole.encoder.state_dict().items():
        assert torch.equal(weight, small.encoder.state_dict()[name])  # the latents are the base's
    assert load_elastic(final).architecture == load_elastic(BASE.with_name("evolved")).architecture
    image = ModelFolder(final).draw([PROMPT], [SEED], SamplerSettings(8, 4.5))[0].astype(int)
    middle = image[16:48, 16:48].mean((0, 1))
    assert middle[0] > 1.5 * max(middle[1], middle[2])  # red
