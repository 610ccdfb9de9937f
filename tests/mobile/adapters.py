"""LoRA files of random numbers for `tiny`'s UNet with `tiny_clip`'s text encoder, in every naming that there is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

from tiny import tiny_pipeline
from tiny_clip import clip_tokenizer, text_config

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_encoder.encoder.layers.0"
#: Layers of all kinds: linear, 1x1 and 3x3 convolutions, the text encoder's.
LAYERS = (
    *(f"{ATTENTION}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "unet.up_blocks.1.attentions.0.proj_in",
    "unet.down_blocks.0.resnets.0.conv1",
    "unet.down_blocks.1.resnets.0.time_emb_proj",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.down_blocks.2.resnets.0.conv_shortcut",
    *(f"{TEXT}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    f"{TEXT}.mlp.fc1",
)
#: What the oldest files can name: attention alone.
ATTENTION_LAYERS = tuple(name for name in LAYERS if "attn" in name)


class Layer(NamedTuple):
    down: torch.Tensor
    up: torch.Tensor
    alpha: float | None


def clip_pipeline() -> StableDiffusionPipeline:
    """The tiny pipeline with a text encoder of CLIP's class, as SD has."""
    pipeline = tiny_pipeline()
    torch.manual_seed(3)
    pipeline.register_modules(text_encoder=CLIPTextModel(text_config(32)).eval(), tokenizer=clip_tokenizer())
    return pipeline


def module(pipeline: StableDiffusionPipeline, name: str) -> torch.nn.Module:
    part, _, path = name.partition(".")
    return getattr(pipeline, part).get_submodule(path)


def random_layers(
    pipeline: StableDiffusionPipeline, names: tuple[str, ...], rank: int = 4, alpha: float | None = 4.0
) -> dict[str, Layer]:
    """Every third layer has another rank."""
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for number, name in enumerate(names):
        shape, r = module(pipeline, name).weight.shape, rank if number % 3 else rank // 2
        down = torch.randn(r, *shape[1:], generator=generator) * 0.2
        up = torch.randn(shape[0], r, *[1] * (len(shape) - 2), generator=generator) * 0.2
        layers[name] = Layer(down, up, alpha)
    return layers


def merged(
    pipeline: StableDiffusionPipeline, layers: Mapping[str, Layer], scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """What kohya's loader makes of them, by hand: W + scale * alpha/r * (up @ down), a missing alpha being r."""
    weights = {}
    for name, (down, up, alpha) in layers.items():
        weight = module(pipeline, name).weight.detach()
        strength = (alpha or down.shape[0]) / down.shape[0]
        delta = torch.einsum("or,ri...->oi...", up.flatten(1), down)
        weights[name] = weight + scale * strength * delta
    return weights


def kohya_name(name: str) -> str:
    part, _, path = name.partition(".")
    path = path.replace("encoder.layers", "text_model.encoder.layers")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part] + path.replace(".", "_")


def save_kohya(layers: Mapping[str, Layer], file: Path, dtype: torch.dtype = torch.float32) -> Path:
    state = {}
    for name, (down, up, alpha) in layers.items():
        state |= {f"{kohya_name(name)}.lora_down.weight": down, f"{kohya_name(name)}.lora_up.weight": up}
        if alpha is not None:
            state[f"{kohya_name(name)}.alpha"] = torch.tensor(alpha)
    return _save(state, file, dtype)


def save_peft(layers: Mapping[str, Layer], file: Path, prefix: str = "") -> Path:
    """As diffusers' training scripts do today; without alphas."""
    state = {}
    for name, layer in layers.items():
        state |= {f"{prefix}{name}.lora_A.weight": layer.down, f"{prefix}{name}.lora_B.weight": layer.up}
    return _save(state, file)


def save_old_diffusers(layers: Mapping[str, Layer], file: Path) -> Path:
    """As diffusers 0.13 to 0.20 did: attention processors, CLIP's names with `text_model`."""
    state = {}
    for name, layer in layers.items():
        parent, _, leaf = name.removesuffix(".0").rpartition(".")
        if name.startswith("text"):
            parent = parent.replace("encoder.layers", "text_model.encoder.layers")
            leaf = leaf.replace("_proj", "")
            key = f"{parent}.to_{leaf}_lora"
        else:
            key = f"{parent}.processor.{leaf}_lora"
        state |= {f"{key}.down.weight": layer.down, f"{key}.up.weight": layer.up}
    return _save(state, file)


def save_lora_linear(layers: Mapping[str, Layer], file: Path) -> Path:
    """As diffusers 0.21 to 0.25 did."""
    state = {}
    for name, layer in layers.items():
        key = f"{name}.lora" if name.startswith("unet") else f"{name}.lora_linear_layer"
        key = key.replace("text_encoder.encoder", "text_encoder.text_model.encoder")
        state |= {f"{key}.down.weight": layer.down, f"{key}.up.weight": layer.up}
    return _save(state, file)


def _save(state: Mapping[str, torch.Tensor], file: Path, dtype: torch.dtype = torch.float32) -> Path:
    save_file({key: value.to(dtype).contiguous() for key, value in state.items()}, file)
    return file
