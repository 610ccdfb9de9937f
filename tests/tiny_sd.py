"""Folders as Stable Diffusion 1.5's: its configurations without weights, and a miniature with random ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from pocketfusion.models.sd_configs import CONFIGS
from tiny_clip import clip_tokenizer, text_config

_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_configs(folder: Path) -> Path:
    """SD-1.5 at full size, nothing but its configurations: 859,520,964 parameters of a UNet in a few kilobytes."""
    parts = CONFIGS["sd-1.5"]
    _write(folder / "unet", {"_class_name": "UNet2DConditionModel", **parts["unet"]})
    _write(folder / "vae", {"_class_name": "AutoencoderKL", **parts["vae"]})
    _write(folder / "text_encoder", {"model_type": "clip_text_model", **parts["text_encoder"]})
    return _rest(folder)


def make_miniature(folder: Path, levels: int = 2) -> Path:
    """SD-1.5's family with random weights: latents 32x32, CLIP of width 32, a UNet of `levels` levels."""
    torch.manual_seed(0)
    down = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=down,
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
        block_out_channels=(64, 128, 256, 256)[:levels],
        layers_per_block=1 if levels == 2 else 2,
        attention_head_dim=2,
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(32, 32, 64, 64),
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.18215,
    )
    for part, network in {"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text_config(32))}.items():
        network.eval().save_pretrained(folder / part)
    return _rest(folder)


def _write(folder: Path, config: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def _rest(folder: Path) -> Path:
    clip_tokenizer().save_pretrained(folder / "tokenizer")
    PNDMScheduler(**_SCHEDULER, skip_prk_steps=True, set_alpha_to_one=False).save_pretrained(folder / "scheduler")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    index = {"_class_name": "StableDiffusionPipeline", **parts, "safety_checker": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
