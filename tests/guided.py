"""Model folders whose guidance is embedded or folded, with a UNet small enough to convert in seconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from pocketfusion.models.sampling import Guidance, Sampling, write_sampling
from tiny import WIDTH, tiny_pipeline

SCALE, STEPS, RANGE = 3.0, 4, (1.0, 8.0)


def small_unet(time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """Two levels with one attention on each side, for latents [B, 4, 8, 8] and prompt states [B, 32, 32]."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        time_cond_proj_dim=time_cond_proj_dim,
    )
    for parameter in unet.time_embedding.parameters():  # an untrained one hardly moves the prediction
        torch.nn.init.normal_(parameter, std=0.5)
    return unet


def make_guided_folder(path: Path, guidance: Guidance) -> Path:
    """Random weights; its `sampling.json` says 4 steps at guidance scale 3."""
    torch.manual_seed(5)
    pipeline = tiny_pipeline()
    pipeline.register_modules(unet=small_unet(12 if guidance == "embedded" else None))
    pipeline.save_pretrained(path, safe_serialization=True)
    learned = RANGE if guidance == "embedded" else None
    write_sampling(
        path,
        Sampling(num_inference_steps=STEPS, guidance_scale=SCALE, guidance=guidance, guidance_range=learned),
    )
    return path
