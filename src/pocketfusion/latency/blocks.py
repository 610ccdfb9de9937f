"""The distinct blocks of Stable Diffusion's three networks at their real widths, each as a network of its own.

What a GPU delegate takes, and what fp16 makes of it, depends on shapes and on the scale of activations, not on
trained weights: a block can be proved alone, with random weights, where the whole network would be too slow for a
software GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from pocketfusion.latency.part_modules import meta_unet, part_module, part_samples
from pocketfusion.latency.unet_parts import list_parts
from pocketfusion.mobile.pipeline_specs import Samples
from pocketfusion.mobile.rewrites.passes import shared_copy
from pocketfusion.mobile.wrappers import nchw, nhwc
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.sd_configs import CONFIGS

#: Largest picture side of the decoder's blocks here: at 512 a software GPU takes minutes for each.
_MAX_SIDE = 128
#: Activations in Stable Diffusion's residual stream: a few units wide, with outlier channels of twenty times that.
#: An assumption, on the safe side of what public ranges of SD-1.5 say.
_ACTIVATION_STD, _OUTLIERS, _OUTLIER_CHANNELS = 2.0, 20.0, 0.01


@dataclass(frozen=True)
class Block:
    """`name`: network and part with its shapes; `module`: on `meta`, NHWC in and out; `samples`: inputs by name."""

    name: str
    module: nn.Module
    samples: Samples


class _Picture(nn.Module):
    """`x` [B, H, W, C] -> `y` [B, H', W', C']: a block of the decoder."""

    def __init__(self, block: nn.Module, *arguments: Any):
        super().__init__()
        self.block, self.arguments = block, arguments

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": nhwc(self.block(nchw(x), *self.arguments))}


class _TimeEmbedding(nn.Module):
    """`timestep_embedding` [B, E] -> `y` [B, D]: what is left of it in the graph."""

    def __init__(self, time_embedding: nn.Module):
        super().__init__()
        self.time_embedding = time_embedding

    def forward(self, timestep_embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.time_embedding(timestep_embedding)}


class _TextLayers(nn.Module):
    """`input_ids` int32 [1, T] -> `y` [1, T, D]: embeddings, the first layers, the last norm."""

    def __init__(self, text_encoder: Any):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.text_encoder(input_ids)[0]}


def _unet_blocks(name: str) -> Iterator[Block]:
    """The UNet's distinct parts of the configuration `name`; its `snapfusion` preset has no others."""
    config = CONFIGS[name]["unet"] | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    architecture = Architecture.stock(config)
    unet = meta_unet(config, architecture)
    for part in {one.key: one for one in list_parts(config, architecture, 77)}.values():
        samples = part_samples(config, part, 77, batch=1)
        if part.kind == "time":
            inputs = {"timestep_embedding": unet.time_proj(samples["timestep"])}
            yield Block(f"{name} unet {part.key}", _TimeEmbedding(unet.time_embedding).eval(), inputs)
            continue
        for key in samples.keys() & {"x", "skip"}:
            samples[key] = _activations(samples[key])
        yield Block(f"{name} unet {part.key}", part_module(unet, part), samples)


def _decoder_blocks(name: str) -> Iterator[Block]:
    """The decoder's distinct parts, at 512 x 512 up to `_MAX_SIDE` and at that size above."""
    config = CONFIGS[name]["vae"]
    with torch.device("meta"):
        decoder = AutoencoderKL(**config).decoder.eval()
    side = config["sample_size"] // 2 ** (len(config["block_out_channels"]) - 1)
    generator = torch.Generator().manual_seed(0)

    def block(label: str, module: nn.Module, channels: int, size: int, *arguments: Any) -> Block:
        shown = min(size, _MAX_SIDE)
        reduced = f" (of {size}x{size})" if shown < size else ""
        x = _activations(torch.randn(1, shown, shown, channels, generator=generator))
        return Block(
            f"{name} decoder {label} {channels}@{shown}x{shown}{reduced}", _Picture(module, *arguments), {"x": x}
        )

    width = config["block_out_channels"][-1]
    yield block("conv_in", decoder.conv_in, config["latent_channels"], side)
    yield block("mid attention", decoder.mid_block.attentions[0], width, side)
    seen = set()
    for up in decoder.up_blocks:
        for resnet in up.resnets:
            key = (resnet.in_channels, resnet.out_channels, side)
            if key not in seen:
                yield block(f"resnet ->{resnet.out_channels}", resnet, resnet.in_channels, side, None)
            seen.add(key)
        if up.upsamplers is not None:
            yield block("upsample", up.upsamplers[0], up.upsamplers[0].channels, side)
            side *= 2
    end = nn.Sequential(decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    yield block("conv_out", end, config["block_out_channels"][0], side)


def _text_blocks(name: str, layers: int = 2) -> Iterator[Block]:
    """The text encoder with `layers` of its layers, which are all alike."""
    config = CONFIGS[name]["text_encoder"] | {"num_hidden_layers": layers}
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(**config)).eval()
    # the only tensors that are no weights: what `meta` cannot hold
    encoder.embeddings.position_ids = torch.arange(config["max_position_embeddings"])[None]
    ids = torch.randint(0, config["vocab_size"], (1, 77), generator=torch.Generator().manual_seed(0)).int()
    yield Block(
        f"{name} text_encoder {layers} layers of {config['hidden_size']}", _TextLayers(encoder), {"input_ids": ids}
    )


def all_blocks(scale: float = 1.0) -> Iterator[Block]:
    """Every distinct block of both configurations, with weights; `scale` multiplies the residual stream."""
    seen = set()
    for name in CONFIGS:
        for block in (*_unet_blocks(name), *_text_blocks(name), *_decoder_blocks(name)):
            key = block.name.removeprefix(name)
            if key not in seen:
                samples = {n: x * scale if n in ("x", "skip") else x for n, x in block.samples.items()}
                yield Block(block.name, with_weights(block.module, scale), samples)
            seen.add(key)


def with_weights(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """A copy of a module (which may be on `meta`) with random weights, which keep the scale of what passes.

    `scale` multiplies what begins a residual stream: embeddings and the first convolution.
    """
    module = shared_copy(module)
    generator = torch.Generator().manual_seed(0)
    for path, parameter in list(module.named_parameters()):
        place, _, name = path.rpartition(".")
        owner = module.get_submodule(place)
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1 and not isinstance(owner, nn.Embedding):
            values *= parameter[0].numel() ** -0.5
        else:
            values = values * 0.1 + (1.0 if isinstance(owner, _NORMS) and name == "weight" else 0.0)
        if isinstance(owner, nn.Embedding) or place.endswith("conv_in"):
            values *= scale
        setattr(owner, name, nn.Parameter(values, requires_grad=False))
    return module


_NORMS = (nn.GroupNorm, nn.LayerNorm)


def _activations(x: torch.Tensor) -> torch.Tensor:
    """Unit noise [..., C] at the scale of a residual stream, with its outlier channels."""
    scale = torch.full((x.shape[-1],), _ACTIVATION_STD)
    scale[: round(x.shape[-1] * _OUTLIER_CHANNELS)] *= _OUTLIERS
    return x * scale
