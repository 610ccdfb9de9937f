"""A bundle with TAESD's class for a decoder: folded exactly, no foreign operation, and stock diffusers' pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

import taesd
from pocketfusion.artefact import sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.info import describe
from pocketfusion.mobile import export as module
from pocketfusion.mobile import gate
from pocketfusion.mobile.convert import DEFAULT_SIGNATURE, convert
from pocketfusion.mobile.export import export
from pocketfusion.mobile.flatbuffer import operations
from pocketfusion.mobile.quantization.weight_forms import quantize
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.wrappers import TinyDecoder
from pocketfusion.models.loading import load_pipeline
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.pipeline import Pipeline

WIDTH = 16


def tiny_vae(**config: Any) -> AutoencoderTiny:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (WIDTH,) * 4}
    vae = AutoencoderTiny(**widths, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4, **config).eval()
    with torch.no_grad():  # pictures with contrast: mean 0, deviation 0.5 in [-1, 1]
        last, pictures = vae.decoder.layers[-1], vae.decode(torch.randn(1, 4, 8, 8)).sample
        std, mean = pictures.std((0, 2, 3)), pictures.mean((0, 2, 3))
        last.weight /= 2 * std[:, None, None, None]
        last.bias.copy_(0.5 + (last.bias - (mean + 1) / 2) / (2 * std))
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def taesd_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder of `tiny_vae`, named as TAESD's own file names its layers. Read only."""
    state = tiny_vae().decoder.layers.state_dict()
    renamed = {f"{int(n) + 1}.{rest}": w for name, w in state.items() for n, _, rest in [name.partition(".")]}
    return taesd.save_state(renamed, tmp_path_factory.mktemp("taesd") / "taesd_decoder.safetensors")


@pytest.fixture(scope="session")
def converted(once: Callable) -> Path:
    """The float32 file of `tiny_vae`'s decoder at 8x8 latents. Read only."""

    def make(root: Path) -> None:
        convert(TinyDecoder(tiny_vae()).eval(), {"latents": torch.randn(1, 8, 8, 4)}, root / "decoder.tflite")

    return once("tiny-decoder", make) / "decoder.tflite"


@pytest.fixture(scope="session")
def exported(converted: Path, tiny_bundle: Path) -> Callable[..., Any]:
    """`export` that takes the decoder's file from `converted` and the other networks' from the tiny bundle."""

    def copy(network: Any, samples: Any, file: Path, settings: Any) -> None:
        name = file.name.partition("-")[0]
        shutil.copyfile(converted if name == "decoder" else tiny_bundle / f"{name}.tflite", file)

    def run(folder: Path, out: Path, **settings: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_convert_network", copy)
            return export(folder, out, **settings)

    return run


@torch.no_grad()
@pytest.mark.parametrize("scaling_factor", [1.0, 0.6])
def test_folded_exactly_and_the_autoencoder_is_left_alone(scaling_factor: float) -> None:
    vae, z = tiny_vae(scaling_factor=scaling_factor), 3 * torch.randn(2, 5, 4, 4)
    expected = vae.decode(z.permute(0, 3, 1, 2) / scaling_factor).sample.permute(0, 2, 3, 1)
    decoder = TinyDecoder(vae)
    assert gate.sqnr(expected.numpy(), decoder(z)["image"].numpy()) > 120
    again = vae.decode(z.permute(0, 3, 1, 2) / scaling_factor).sample.permute(0, 2, 3, 1)
    assert torch.equal(again, expected)
    # the rewrites for diffusers' own doubling hold here
    for name in ("subpixel-upsample", "upsample"):
        rewritten, counts = rewrite(decoder, names=[name])
        assert counts == {name: 3}
        assert gate.sqnr(expected.numpy(), rewritten(z)["image"].numpy()) > 110


def test_another_doubling_is_refused() -> None:
    with pytest.raises(PocketfusionError, match="scales by 2 \\('bilinear'\\): only doubling to the nearest"):
        TinyDecoder(tiny_vae(upsample_fn="bilinear"))


def test_a_bundle_draws_what_the_stock_pipeline_draws_with_it(
    exported: Callable, taesd_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    report = exported(tiny_folder, tmp_path / "b", vae=taesd_file)
    assert {row.name: row.sqnr_db > 60 for row in report.networks}["decoder"]
    bundle = Bundle.open(tmp_path / "b")
    decoder = bundle.manifest.networks.decoder
    assert decoder.parameters == sum(p.numel() for p in tiny_vae().decoder.parameters())
    assert bundle.manifest.provenance["vae"] == {"file": taesd_file.name, "sha256": sha256_file(taesd_file)}
    assert bundle.manifest.preview is not None  # of the folder's encoder, as the file has none
    assert set(operations(tmp_path / "b" / "decoder.tflite")[0]) == {
        *("CONV_2D", "ADD", "RESIZE_NEAREST_NEIGHBOR", "MUL", "TANH")
    }
    stock = load_pipeline(tiny_folder)
    stock.register_modules(vae=tiny_vae())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    settings = {"num_inference_steps": 6, "guidance_scale": 4.0}
    expected = np.asarray(stock("a red apple", latents=latents.clone(), **settings).images[0], np.float64)
    nhwc = np.ascontiguousarray(latents.permute(0, 2, 3, 1).numpy())
    pipeline, previews, seen = Pipeline(bundle, 1), [], []

    def keep(step: int, timestep: float, latents: np.ndarray) -> None:  # as `generate --preview` has it
        seen.append(torch.from_numpy(latents).permute(0, 3, 1, 2))
        previews.append(np.asarray(pipeline.decode(latents), np.float64))

    drawn = pipeline.generate("a red apple", latents=nhwc, **settings, callback=keep).images[0]
    error = np.mean((np.asarray(drawn, np.float64) - expected) ** 2)
    assert expected.std() > 20  # there is something in it
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 60
    assert np.array_equal(previews[-1], drawn) and not np.array_equal(previews[0], drawn)
    decoded = stock.vae.decode(seen[0] / stock.vae.config.scaling_factor).sample[0] / 2 + 0.5  # the first step's
    assert np.abs(decoded.permute(1, 2, 0).clamp(0, 1).detach().numpy() * 255 - previews[0]).max() < 1


@pytest.mark.parametrize(("form", "least"), [("float16", 45), ("int8", 25), ("int8-dynamic", 20)])
def test_smaller_weights(converted: Path, tmp_path: Path, form: str, least: float) -> None:
    forms = quantize(converted, tmp_path / "small.tflite", form)
    assert forms["conv_in"] == forms["conv_out"] == "float16" and forms["layers.1.conv.2"] == form
    z = torch.randn(1, 8, 8, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = TinyDecoder(tiny_vae())(z)["image"].numpy()
    (measured,) = gate.run(tmp_path / "small.tflite", [{"latents": z.numpy()}], "image", DEFAULT_SIGNATURE)
    assert gate.sqnr(expected, measured) > least


def test_a_folder_whose_own_autoencoder_is_tiny(exported: Callable, tiny_folder_copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(tiny_folder_copy / "vae")
    tiny_vae().save_pretrained(tiny_folder_copy / "vae")
    about = describe(tiny_folder_copy)
    assert not about["problems"] and about["networks"]["vae"]["class"] == "AutoencoderTiny"
    assert about["image"] == {"height": 64, "width": 64} and about["multiply_adds"]["decoder"] > 0
    exported(tiny_folder_copy, tmp_path / "b")
    manifest = Bundle.open(tmp_path / "b").manifest
    assert manifest.image.height == 64 and manifest.preview is not None
    assert manifest.networks.decoder.macs == about["multiply_adds"]["decoder"]


def test_refused_before_anything_is_loaded(
    taesd_file: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, "load_pipeline")
    other = taesd.save(taesd.decoder(8, channels=16), tmp_path / "taesd3_decoder.safetensors")
    encoder = taesd.save(taesd.encoder(8), tmp_path / "taesd_encoder.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(taesd_file.read_bytes()[:-7])
    for file, match in (
        (other, "16 channels"),
        (encoder, "is an encoder"),
        (tmp_path / "cut.safetensors", "truncated"),
    ):
        with pytest.raises(PocketfusionError, match=match):
            export(tiny_folder, tmp_path / "out", vae=file)
    assert not (tmp_path / "out").exists()
