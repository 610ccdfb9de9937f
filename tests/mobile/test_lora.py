"""LoRA merged at export against the adapter running beside the weights; adapters of another base."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import load_pipeline
from pocketfusion.mobile.lora import merge_lora


@pytest.fixture
def pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    return load_pipeline(tiny_folder)


def _with_adapter(unet: UNet2DConditionModel) -> None:
    unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"]))
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:  # zero at first
            parameter.data.normal_(0, 0.1)


def _inputs(unet: UNet2DConditionModel) -> tuple[torch.Tensor, ...]:
    size = unet.config.sample_size
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, unet.config.in_channels, size, size, generator=generator),
        torch.tensor([300.0]),
        torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator),
    )


@torch.no_grad()
def test_merged_is_the_adapter_beside_the_weights(
    pipeline: StableDiffusionPipeline, tiny_folder: Path, tmp_path: Path
) -> None:
    plain = pipeline.unet(*_inputs(pipeline.unet))[0]
    _with_adapter(pipeline.unet)
    expected = pipeline.unet(*_inputs(pipeline.unet))[0]
    pipeline.unet.save_lora_adapter(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert (expected - plain).abs().max() > 1e-3

    fresh = load_pipeline(tiny_folder)
    assert merge_lora(fresh, file) == 0
    assert not any("lora" in name for name, _ in fresh.unet.named_parameters())
    merged = fresh.unet(*_inputs(fresh.unet))[0]
    assert torch.allclose(merged, expected, atol=1e-5)

    half = load_pipeline(tiny_folder)
    merge_lora(half, file, scale=0.0)
    assert torch.allclose(half.unet(*_inputs(half.unet))[0], plain, atol=1e-6)


def test_an_adapter_of_another_base_is_told(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    config = dict(pipeline.unet.config)
    other = UNet2DConditionModel(
        **{k: v for k, v in config.items() if not k.startswith("_")} | {"cross_attention_dim": 24}
    )
    _with_adapter(other)
    other.save_lora_adapter(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    with pytest.raises(PocketfusionError, match=r"is a LoRA of another base: unet\..* is \d+ wide here and 24 in it"):
        merge_lora(pipeline, file)
    save_file({"unet.nowhere.to_q.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "far.safetensors")
    with pytest.raises(PocketfusionError, match="none of its layers is in this model"):
        merge_lora(pipeline, tmp_path / "far.safetensors")


def test_what_is_no_adapter_is_told(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for file, message in (("plain", "holds no LoRA"), ("text", "not a safetensors"), ("none", "there is no LoRA")):
        with pytest.raises(PocketfusionError, match=message):
            merge_lora(pipeline, tmp_path / f"{file}.safetensors")
    with pytest.raises(PocketfusionError, match="--lora-scale is nan"):
        merge_lora(SimpleNamespace(), tmp_path / "plain.safetensors", float("nan"))
