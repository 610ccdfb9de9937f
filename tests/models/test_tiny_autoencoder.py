"""TAESD from diffusers' folder and from its original files: the same numbers, or refused by a true name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

import taesd
from pocketfusion.errors import PocketfusionError
from pocketfusion.models.slim_autoencoder import load_vae
from pocketfusion.models.tiny_autoencoder import check_vae, latents_of, load_decoder, vae_config, vae_hash

WIDTH = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """taesd_decoder.safetensors and taesd_encoder.safetensors. Read only."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("taesd")
    taesd.save(taesd.decoder(WIDTH), root / "taesd_decoder.safetensors")
    taesd.save(taesd.encoder(WIDTH), root / "taesd_encoder.safetensors")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """diffusers' folder. Read only."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("tiny") / "taesd"
    AutoencoderTiny(encoder_block_out_channels=(WIDTH,) * 4, decoder_block_out_channels=(WIDTH,) * 4).save_pretrained(
        path
    )
    return path


@torch.no_grad()
def test_original_files_give_the_original_s_numbers(files: Path) -> None:
    torch.manual_seed(0)
    decoder, encoder = taesd.decoder(WIDTH), taesd.encoder(WIDTH)
    vae = load_decoder(files / "taesd_decoder.safetensors")
    z, pictures = 4 * torch.randn(2, 4, 3, 5), torch.rand(1, 3, 16, 24)
    torch.testing.assert_close(vae.decode(z).sample, 2 * decoder(z) - 1)
    torch.testing.assert_close(latents_of(vae, 2 * pictures - 1), encoder(pictures))


@torch.no_grad()
def test_a_decoder_alone_in_half_precision(files: Path, tmp_path: Path) -> None:
    file = tmp_path / "renamed.safetensors"
    save_file({name: weight.half() for name, weight in load_file(files / "taesd_decoder.safetensors").items()}, file)
    vae = load_decoder(file)
    assert vae.encoder is None and vae.dtype == torch.float32
    whole = load_decoder(files / "taesd_decoder.safetensors")
    z = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(vae.decode(z).sample, whole.decode(z).sample, atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_other_depths_and_latents_are_read_from_the_shapes(tmp_path: Path) -> None:
    vae = AutoencoderTiny(
        encoder_block_out_channels=(6, 6), decoder_block_out_channels=(10, 10, 10), latent_channels=16,
        num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 0, 1),
    ).eval()  # fmt: skip
    file = tmp_path / "one.safetensors"
    save_file(vae.state_dict(), file)  # diffusers' names in one file
    loaded = load_decoder(file)
    assert {key: loaded.config[key] for key in ("latent_channels", "num_encoder_blocks", "num_decoder_blocks")} == {
        "latent_channels": 16, "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 0, 1)
    }  # fmt: skip
    z, x = torch.randn(1, 16, 2, 2), torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(loaded.decode(z).sample, vae.decode(z).sample)
    torch.testing.assert_close(loaded.encode(x).latents, vae.encode(x).latents)


@torch.no_grad()
def test_folders_of_both_classes(folder: Path, tiny_folder: Path) -> None:
    stock = AutoencoderTiny.from_pretrained(folder)
    z = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(load_decoder(folder).decode(z).sample, stock.decode(z).sample)
    large = load_decoder(tiny_folder)  # a model folder's vae/
    assert isinstance(large, AutoencoderKL) and vae_hash(tiny_folder) == vae_hash(tiny_folder / "vae")
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(latents_of(large, x), large.encode(x).latent_dist.mean * 0.7)
    assert vae_config(folder)["latent_channels"] == 4


def test_training_wants_a_distribution(folder: Path) -> None:
    with pytest.raises(PocketfusionError, match="AutoencoderTiny, whose latents have no distribution"):
        load_vae(folder)


def refused(path: Path, match: str) -> None:
    with pytest.raises(PocketfusionError, match=match) as caught:
        load_decoder(path)
    assert "\n" not in str(caught.value)


def altered(files: Path, tmp_path: Path, **weights: torch.Tensor | None) -> Path:
    state = load_file(files / "taesd_decoder.safetensors")
    for name, weight in weights.items():
        state.pop(name, None)
        if weight is not None:
            state[name] = weight
    save_file(state, tmp_path / "altered.safetensors")
    return tmp_path / "altered.safetensors"


def test_what_is_no_decoder_of_taesd(files: Path, tiny_folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "no", "no autoencoder at .*no")
    refused(files / "taesd_encoder.safetensors", "is an encoder.*give the decoder")
    content = (files / "taesd_decoder.safetensors").read_bytes()
    for cut in (0, 5, 300, len(content) - 1):
        (tmp_path / "cut.safetensors").write_bytes(content[:cut])
        refused(tmp_path / "cut.safetensors", "truncated")
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    refused(tmp_path / "lora.safetensors", "LoRA adapter.*--lora")
    refused(tiny_folder / "vae" / "diffusion_pytorch_model.safetensors", "larger model's file.*diffusers folder")
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "is not TAESD's: it holds 'weight'")
    save_file({}, tmp_path / "empty.safetensors")
    refused(tmp_path / "empty.safetensors", "holds no weights")
    torch.save({}, tmp_path / "taesd_decoder.pth")
    refused(tmp_path / "taesd_decoder.pth", "pickled and is never read")
    refused(tmp_path, "config.json cannot be read")


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"3.conv.2.bias": None}, "lacks the weight decoder.layers.2.conv.2.bias"),
        ({"3.conv.5.bias": torch.zeros(WIDTH)}, "holds decoder.layers.2.conv.5.bias, which TAESD has not"),
        ({"3.conv.2.bias": torch.zeros(3)}, r"conv.2.bias is \[3\] and not \[8\]"),
        ({"3.conv.2.bias": torch.full((WIDTH,), float("nan"))}, "conv.2.bias holds NaN"),
        ({"1.weight": torch.zeros(WIDTH, 4)}, "not TAESD's decoder: its layers are others"),
    ],
)
def test_a_weight_that_is_wrong(files: Path, tmp_path: Path, weights: dict[str, torch.Tensor], match: str) -> None:
    refused(altered(files, tmp_path, **weights), match)


def test_an_autoencoder_of_another_family(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    check_vae(folder, tiny_folder)
    for name, config, match in (
        ("taesd3", {"latent_channels": 16}, "16 channels and the UNet of .* makes 4"),
        ("grey", {"out_channels": 1}, "pictures of 1 channels"),
        ("flat", {"decoder_block_out_channels": [8, 8, 8]}, "4 pixels a latent and the autoencoder of .* 8"),
    ):
        copy = shutil.copytree(folder, tmp_path / name)
        (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | config))
        with pytest.raises(PocketfusionError, match=match):
            check_vae(copy, tiny_folder)
    torch.manual_seed(2)
    file = taesd.save(taesd.decoder(WIDTH, channels=16), tmp_path / "taesd3_decoder.safetensors")
    with pytest.raises(PocketfusionError, match="16 channels and the UNet of .* makes 4"):
        check_vae(file, tiny_folder)
