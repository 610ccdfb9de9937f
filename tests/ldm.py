"""Stable Diffusion in miniature, and any pipeline as one file in the original (LDM) layout: an inverse key map."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

VOCABULARY = 49408
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_OUTER = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def miniature(family: str = "sd1", seed: int = 0, layers: int = 1, depth: int = 2) -> Any:
    """UNet, autoencoder and text encoder of SD's shape with CLIP's vocabulary and random weights, some MB.

    `sd1`: 8 heads, convolutions around the transformers, quick_gelu; `sd2`: heads of 64 channels, linear layers, gelu.
    `depth`: layers of the text encoder that are used.
    """
    torch.manual_seed(seed)
    second = family == "sd2"
    channels = (64, 64, 128, 128) if second else (32, 64, 64, 96)
    unet = UNet2DConditionModel(
        sample_size=96 if second else 64,
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=32,
        cross_attention_dim=64,
        attention_head_dim=tuple(width // 64 for width in channels) if second else 8,
        use_linear_projection=second,
    )
    vae = AutoencoderKL(
        sample_size=768 if second else 512,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        scaling_factor=0.18215,
    )
    text = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=depth,
        num_attention_heads=1,
        max_position_embeddings=77,
        hidden_act="gelu" if second else "quick_gelu",
    )
    return SimpleNamespace(unet=unet.eval(), vae=vae.eval(), text_encoder=CLIPTextModel(text).eval())


def ldm_state(model: Any, *, ema: float | None = None) -> dict[str, torch.Tensor]:
    """The three networks' weights under the original names; `ema`: with averages that are that multiple of them."""
    state = {f"model.diffusion_model.{name}": one for name, one in ldm_unet(model.unet).items()}
    if ema is not None:
        state |= {
            "model_ema." + name.removeprefix("model.").replace(".", ""): value * ema for name, value in state.items()
        }
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    state |= {f"first_stage_model.{name}": one for name, one in ldm_vae(model.vae).items()}
    text = model.text_encoder
    open_clip = text.config.hidden_act == "gelu"
    return state | (open_clip_text(text) if open_clip else clip_text(text))


def save(state: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> Path:
    """Writes a checkpoint's file."""
    save_file({name: value.contiguous().clone() for name, value in state.items()}, file, metadata)
    return file


def leftovers() -> dict[str, torch.Tensor]:
    """What training leaves in such a file, and a tensor that nothing knows."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return {
        "betas": betas.float(),
        "alphas_cumprod": (1 - betas).cumprod(0).float(),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
        "cond_stage_model.logit_scale": torch.zeros(1),
        "somebody.elses": torch.zeros(3),
    }


def ldm_unet(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    size = unet.config["layers_per_block"] + 1
    state = {}
    for name, value in unet.state_dict().items():
        words = name.split(".")
        where, end = ".".join(words[:-1]), words[-1]
        if where in _OUTER:
            state[f"{_OUTER[where]}.{end}"] = value
            continue
        if words[0] == "mid_block":
            number = int(words[2])
            block = f"middle_block.{1 if words[1] == 'attentions' else 2 * number}"
            rest = words[3:]
        else:
            level, kind, number, rest = int(words[1]), words[2], int(words[3]), words[4:]
            down = words[0] == "down_blocks"
            index = level * size + down + (size - 1 if "samplers" in kind else number)
            block = f"{'input' if down else 'output'}_blocks.{index}"
            attends = any(other.startswith(f"{words[0]}.{level}.attentions") for other in unet.state_dict())
            if kind == "downsamplers":
                block, rest = f"{block}.0", ["op"]
            elif kind == "upsamplers":
                block, rest = f"{block}.{2 if attends else 1}", ["conv"]
            else:
                block = f"{block}.{1 if kind == 'attentions' else 0}"
            rest = rest if "samplers" not in kind else [*rest, end]
        if rest[0] in _RESNET:
            rest = [_RESNET[rest[0]], *rest[1:]]
        state[".".join([block, *rest])] = value
    return state


def ldm_vae(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    levels = len(vae.config["block_out_channels"])
    state = {}
    for name, value in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
        name = re.sub(r"(up\.\d+)\.resnets", r"\1.block", name).replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0." in name:
            for new, old in _VAE_ATTENTION.items():
                name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            if value.ndim == 2:
                value = value[:, :, None, None]
        state[name] = value
    return state


def clip_text(text: CLIPTextModel) -> dict[str, torch.Tensor]:
    prefix = "cond_stage_model.transformer.text_model."
    state = {prefix + name.removeprefix("text_model."): value for name, value in text.state_dict().items()}
    return state | {f"{prefix}embeddings.position_ids": torch.arange(77)[None]}


def open_clip_text(text: CLIPTextModel) -> dict[str, torch.Tensor]:
    """With what OpenCLIP's tower has beside: a last layer that SD-2 does not use, and the head."""
    prefix, given = "cond_stage_model.model.", text.state_dict()
    given = {name.removeprefix("text_model."): value for name, value in given.items()}
    state = {
        "token_embedding.weight": given["embeddings.token_embedding.weight"],
        "positional_embedding": given["embeddings.position_embedding.weight"],
        "ln_final.weight": given["final_layer_norm.weight"],
        "ln_final.bias": given["final_layer_norm.bias"],
        "text_projection": torch.randn(text.config.hidden_size, text.config.hidden_size),
        "logit_scale": torch.tensor(4.6),
    }
    depth = text.config.num_hidden_layers
    for number in range(depth + 1):
        layer, block = f"encoder.layers.{min(number, depth - 1)}.", f"transformer.resblocks.{number}."
        for end in ("weight", "bias"):
            parts = [given[f"{layer}self_attn.{which}_proj.{end}"] for which in "qkv"]
            state[f"{block}attn.in_proj_{end}"] = torch.cat(parts)
            state[f"{block}attn.out_proj.{end}"] = given[f"{layer}self_attn.out_proj.{end}"]
            for new, old in _OPEN_CLIP.items():
                state[f"{block}{old}.{end}"] = given[f"{layer}{new}.{end}"]
    return {prefix + name: value for name, value in state.items()}
