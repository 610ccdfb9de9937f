"""The networks' configurations, read off the shapes in a checkpoint: no file of the original layout states them.

What shapes do not tell is Stable Diffusion's own: 32 norm groups; 8 heads (SD-1) or heads of 64 channels (SD-2) in
the UNet, heads of 64 channels in the text encoder; its activation; the latents' scale 0.18215.
"""

from __future__ import annotations

import re
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.bring.clip_words import VOCABULARY
from pocketfusion.recognise import CLIP, OPEN_CLIP, UNET, VAE, Checkpoint, short

GROUPS = 32
_HEAD = 64  #: channels of a head of SD-2's UNet and of CLIP's text encoders
#: OpenCLIP's text encoder has more layers than are used: SD-2 takes the states before the last ("penultimate").
_WHOLE_OPEN_CLIP = 24


def unet_config(checkpoint: Checkpoint, sample_size: int) -> dict[str, Any]:
    """`UNet2DConditionModel`'s configuration for latents of `sample_size`; raises PocketfusionError if it has none."""
    names = checkpoint.names(UNET)
    blocks = _count(names, re.escape(UNET) + r"input_blocks\.(\d+)\.")
    channels, layers, attends = [checkpoint.shape(f"{UNET}input_blocks.0.0.weight")[0]], [0], [False]
    for i in range(1, blocks):
        block = f"{UNET}input_blocks.{i}."
        if f"{block}0.op.weight" in checkpoint.tensors:
            channels, layers, attends = [*channels, 0], [*layers, 0], [*attends, False]
            continue
        channels[-1] = checkpoint.shape(f"{block}0.out_layers.3.weight")[0]
        layers[-1] += 1
        attends[-1] |= f"{block}1.proj_in.weight" in checkpoint.tensors
    state = next(name for name in names if name.endswith("attn2.to_k.weight"))
    if len(set(layers)) > 1 or 0 in layers:
        raise PocketfusionError(
            f"{checkpoint.file} is of another architecture: its UNet has {layers} layers at its levels, where Stable "
            "Diffusion has equally many"
        )
    _divisible(checkpoint, "UNet", channels)
    heads = [max(1, width // _HEAD) for width in channels] if checkpoint.linear else 8
    if any(width % count for width in channels for count in (heads if isinstance(heads, list) else [heads])):
        raise PocketfusionError(f"{checkpoint.file}: {channels} channels do not divide into {heads} heads")
    return {
        "sample_size": sample_size,
        "in_channels": checkpoint.shape(f"{UNET}input_blocks.0.0.weight")[1],
        "out_channels": checkpoint.shape(f"{UNET}out.2.weight")[0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
        "block_out_channels": tuple(channels),
        "layers_per_block": layers[0],
        "norm_num_groups": GROUPS,
        "cross_attention_dim": checkpoint.shape(state)[1],
        "attention_head_dim": tuple(heads) if isinstance(heads, list) else heads,  # diffusers' name for their number
        "use_linear_projection": checkpoint.linear,
    }


def vae_factor(checkpoint: Checkpoint) -> int:
    """Pixels a latent's side; Stable Diffusion's 8 where the file has no autoencoder."""
    levels = _count(checkpoint.names(VAE), re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    return 2 ** (levels - 1) if levels else 8


def vae_config(checkpoint: Checkpoint, latent_size: int, scaling_factor: float = 0.18215) -> dict[str, Any]:
    """`AutoencoderKL`'s configuration for latents of `latent_size`; raises PocketfusionError if it has none."""
    names = checkpoint.names(VAE)
    levels = _count(names, re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    if not levels:
        raise PocketfusionError(f"{checkpoint.file} lacks an autoencoder's encoder (encoder.down): give a whole one")
    blocks = [_count(names, rf"{re.escape(VAE)}encoder\.down\.{i}\.block\.(\d+)\.") for i in range(levels)]
    channels = [checkpoint.shape(f"{VAE}encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)]
    if len(set(blocks)) > 1:
        raise PocketfusionError(f"{checkpoint.file} is of another architecture: its encoder has {blocks} blocks")
    _divisible(checkpoint, "autoencoder", channels)
    return {
        "in_channels": checkpoint.shape(f"{VAE}encoder.conv_in.weight")[1],
        "out_channels": checkpoint.shape(f"{VAE}decoder.conv_out.weight")[0],
        "sample_size": latent_size * vae_factor(checkpoint),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(channels),
        "layers_per_block": blocks[0],
        "latent_channels": checkpoint.shape(f"{VAE}decoder.conv_in.weight")[1],
        "norm_num_groups": GROUPS,
        "scaling_factor": scaling_factor,
    }


def text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """`CLIPTextConfig`'s values.

    OpenCLIP's text tower has one layer more than SD-2 uses. Of 24 layers, or of a tower with its head
    (`text_projection`), the last is left out; of a file that was written back without them all are taken.
    Raises PocketfusionError for a vocabulary that is not CLIP's.
    """
    if checkpoint.open_clip:
        tokens, positions = f"{OPEN_CLIP}token_embedding.weight", f"{OPEN_CLIP}positional_embedding"
        layer = f"{OPEN_CLIP}transformer.resblocks."
        wide = f"{layer}0.mlp.c_fc.weight"
    else:
        base = f"{CLIP}text_model."
        tokens, positions = (f"{base}embeddings.{one}_embedding.weight" for one in ("token", "position"))
        layer = f"{base}encoder.layers."
        wide = f"{layer}0.mlp.fc1.weight"
    depth = found = _count(checkpoint.names(layer), re.escape(layer) + r"(\d+)\.")
    if checkpoint.open_clip and (found == _WHOLE_OPEN_CLIP or f"{OPEN_CLIP}text_projection" in checkpoint.tensors):
        depth = found - (found != _WHOLE_OPEN_CLIP - 1)
    words, hidden = checkpoint.shape(tokens)
    if words != VOCABULARY:
        raise PocketfusionError(
            f"{checkpoint.file} has embeddings of {words:,} tokens and CLIP's vocabulary {VOCABULARY:,}: a file with "
            "learnt tokens does not name them, so take the checkpoint without and give them with --embedding"
        )
    return {
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": checkpoint.shape(wide)[0],
        "num_hidden_layers": depth,
        "num_attention_heads": max(1, hidden // _HEAD),
        "max_position_embeddings": checkpoint.shape(positions)[0],
        "hidden_act": "gelu" if checkpoint.linear else "quick_gelu",
        "bos_token_id": 0,  # as the published folders say; prompts' own come from the tokenizer
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _count(names: list[str], pattern: str) -> int:
    """One more than the highest number that the pattern finds."""
    compiled = re.compile(pattern)
    return max((int(match[1]) for name in names if (match := compiled.match(name))), default=-1) + 1


def _divisible(checkpoint: Checkpoint, what: str, channels: list[int]) -> None:
    for width in channels:
        if width % GROUPS or not width:
            raise PocketfusionError(
                f"{checkpoint.file} is of another architecture: its {what} has {short(str(channels))} channels, which "
                f"do not divide by Stable Diffusion's {GROUPS} norm groups"
            )
