"""Stable Diffusion in the smallest size that exports in seconds, and the kinds of folders and files it comes as.

Two levels, 8×8 latents, 32-px pictures; CLIP's own vocabulary, so that a checkpoint file of it is one of the family.
The weights are random, with the gains that make a picture of them: contrast, and an answer to the prompt. They are
numbers that float16 and bfloat16 hold too, so that a file in either is of the same network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from pocketfusion.models.bring.clip_words import clip_tokenizer

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "cross_attention_dim": 64,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def rounded(network: Any) -> Any:
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.bfloat16().half())
    return network.eval()


def autoencoder(seed: int = 0, width: int = 32) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(width,) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.18215,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 3
    return rounded(vae)


def tiny_autoencoder() -> AutoencoderTiny:
    """TAESD's class. Its last convolution gives colours of 0 to 1: here of mean a half and deviation 0.3."""
    torch.manual_seed(4)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(16,) * 4,
        decoder_block_out_channels=(16,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    with torch.no_grad():
        colours = vae.decode(torch.randn(1, 4, 8, 8)).sample / 2 + 0.5
        last, gain = vae.decoder.layers[-1], 0.3 / colours.std()
        last.weight *= gain
        last.bias.copy_(0.5 - (colours.mean((0, 2, 3)) - last.bias) * gain)
    return rounded(vae)


def text_encoder(family: str = "sd1", layers: int = 2) -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=1,
        max_position_embeddings=77, hidden_act="gelu" if family == "sd2" else "quick_gelu",
    )  # fmt: skip
    return rounded(CLIPTextModel(config))


def unet(family: str = "sd1", **changes: Any) -> UNet2DConditionModel:
    """`sd1`: 8 heads, convolutions around the transformers; `sd2`: heads listed by level, linear layers."""
    torch.manual_seed(2)
    second = {"attention_head_dim": (1, 1), "use_linear_projection": True}
    made = UNet2DConditionModel(**_UNET | (second if family == "sd2" else {"attention_head_dim": 8}) | changes)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "attn2.to_out" in name:
                weight *= 8
        made.conv_out.weight *= 3
    return rounded(made)


def scheduler(family: str = "sd1") -> Any:
    """As the published folders have it."""
    if family == "sd2":
        return DDIMScheduler(
            **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
        )
    return PNDMScheduler(**BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)


def pipeline(family: str = "sd1", **parts: Any) -> StableDiffusionPipeline:
    """The whole of it; `parts` take others' places."""
    own = {
        "unet": unet(family),
        "vae": autoencoder(),
        "text_encoder": text_encoder(family),
        "tokenizer": clip_tokenizer(77, "!" if family == "sd2" else "<|endoftext|>"),
        "scheduler": scheduler(family),
    }
    nothing = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    return StableDiffusionPipeline(**own | parts, **nothing, requires_safety_checker=False)


def save(made: StableDiffusionPipeline, folder: Path) -> Path:
    made.save_pretrained(folder, safe_serialization=True)
    return folder
