"""Stable Diffusion's own configurations at full size, with random weights: what needs sizes, not weights.

Values are those of the published `unet/config.json`, `vae/config.json` and `text_encoder/config.json` of SD-1.5 and
SD-2.1-base (512 px); SD-1.5's UNet has 859,520,964 parameters, SD-2.1's 865,910,724.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
_VAE: dict[str, Any] = {
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
_TEXT: dict[str, Any] = {"vocab_size": 49408, "max_position_embeddings": 77, "pad_token_id": 1}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "sd-1.5": {
        "unet": {**_UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _VAE,
        "text_encoder": {
            **_TEXT,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
    },
    "sd-2.1": {
        "unet": {
            **_UNET,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "vae": _VAE,
        "text_encoder": {
            **_TEXT,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
    },
}


def random_pipeline(name: str) -> Any:
    """Components of the configuration `name` as a pipeline has them; the UNet on `meta`, the others random.

    The tokenizer is the little that says the prompt's length: prompts cannot be tokenised with it.
    """
    config = CONFIGS[name]
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config["unet"])
    return SimpleNamespace(
        unet=unet,
        vae=AutoencoderKL(**config["vae"]).eval(),
        text_encoder=CLIPTextModel(CLIPTextConfig(**config["text_encoder"])).eval(),
        tokenizer=SimpleNamespace(model_max_length=77, pad_token="<|endoftext|>", pad_token_id=49407),
    )
