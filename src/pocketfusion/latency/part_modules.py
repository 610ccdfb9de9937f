"""A part as a network of its own: the elastic UNet's module, NHWC in and out as the exporter's wrappers have it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pocketfusion.latency.unet_parts import Part
from pocketfusion.mobile.pipeline_specs import Samples
from pocketfusion.mobile.wrappers import UNet, nchw, nhwc
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic_unet import ElasticUNet

#: Standard deviation of random weights: activations stay finite through any number of blocks.
_WEIGHT_STD = 0.02


class ConvIn(nn.Module):
    """`x` [B, H, W, C_in] -> `y` [B, H, W, C]."""

    def __init__(self, unet: Any, part: Part):
        super().__init__()
        self.conv_in = unet.conv_in

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": nhwc(self.conv_in(nchw(x)))}


class TimeEmbedding(nn.Module):
    """`timestep` [B] -> `temb` [B, D]."""

    def __init__(self, unet: Any, part: Part):
        super().__init__()
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding

    def forward(self, timestep: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"temb": self.time_embedding(self.time_proj(timestep))}


class Residual(nn.Module):
    """A ResNet, or what a removed one leaves: `x`, in an up path `skip`, and `temb` [B, D] -> `y`; NHWC."""

    def __init__(self, unet: Any, part: Part):
        super().__init__()
        stage, _, key = part.name.rpartition(".")
        self.block = unet.get_submodule(stage)[key]
        self.shortcut = part.kind == "shortcut"

    def forward(
        self, x: torch.Tensor, temb: torch.Tensor | None = None, skip: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        joined = nchw(x) if skip is None else torch.cat([nchw(x), nchw(skip)], dim=1)
        return {"y": nhwc(self.block(joined) if self.shortcut else self.block(joined, temb))}


class CrossAttention(nn.Module):
    """`x` [B, H, W, C] and `encoder_hidden_states` [B, T, D] -> `y` [B, H, W, C]."""

    def __init__(self, unet: Any, part: Part):
        super().__init__()
        stage, _, key = part.name.rpartition(".")
        self.block = unet.get_submodule(stage)[key]

    def forward(self, x: torch.Tensor, encoder_hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": nhwc(self.block(nchw(x), encoder_hidden_states=encoder_hidden_states, return_dict=False)[0])}


class Sampler(nn.Module):
    """A down- or upsampler: `x` [B, H, W, C] -> `y` [B, H', W', C]."""

    def __init__(self, unet: Any, part: Part):
        super().__init__()
        self.sampler = unet.get_submodule(part.name)
        before, after = part.sizes
        # An odd side was rounded up when halved, so the upsampler is told the size.
        uneven = part.kind == "upsample" and after != (2 * before[0], 2 * before[1])
        self.arguments = (after,) if uneven else ()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": nhwc(self.sampler(nchw(x), *self.arguments))}


class ConvOut(nn.Module):
    """The output's norm, SiLU and convolution: `x` [B, H, W, C] -> `y` [B, H, W, C_out]."""

    def __init__(self, unet: Any, part: Part):
        super().__init__()
        self.conv_norm_out, self.conv_act, self.conv_out = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": nhwc(self.conv_out(self.conv_act(self.conv_norm_out(nchw(x)))))}


class Empty(nn.Module):
    """One small addition: what is left when a call does nothing."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x + 1.0}


_WRAPPERS: dict[str, Callable[[Any, Part], nn.Module]] = {
    "conv_in": ConvIn,
    "time": TimeEmbedding,
    "resnet": Residual,
    "shortcut": Residual,
    "attention": CrossAttention,
    "downsample": Sampler,
    "upsample": Sampler,
    "conv_out": ConvOut,
}


def meta_unet(config: Mapping[str, Any], architecture: Architecture) -> ElasticUNet:
    """The network's shapes without its weights: cheap, whatever its size."""
    stock = {key: value for key, value in config.items() if not key.startswith("_") and key != "architecture"}
    with torch.device("meta"):
        return ElasticUNet(**stock, architecture=architecture.model_dump(mode="json")).eval()


def part_module(unet: nn.Module, part: Part) -> nn.Module:
    """`part` of `unet` as a network of its own, sharing `unet`'s weights."""
    return _WRAPPERS[part.kind](unet, part).eval()


def with_random_weights(module: nn.Module) -> nn.Module:
    """A copy of `module`, whose weights are on `meta`, on the CPU; one that has weights is returned as it is.

    Latency does not depend on weights, so that none are read.
    """
    if not any(parameter.is_meta for parameter in module.parameters()):
        return module
    generator = torch.Generator().manual_seed(0)
    module = copy.deepcopy(module).to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.normal_(0.0, _WEIGHT_STD, generator=generator)
    return module.requires_grad_(False).eval()


def part_samples(config: Mapping[str, Any], part: Part, text_length: int, batch: int) -> Samples:
    """Inputs for a part at that batch size, by name."""
    if part.kind == "time":
        return {"timestep": torch.full((batch,), 500.0)}
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    samples = {"x": draw(*part.sizes[0], part.channels[0])}
    if part.kind == "resnet":
        samples["temb"] = draw(config["block_out_channels"][0] * 4)
    if part.skip:
        samples["skip"] = draw(*part.sizes[0], part.skip)
    if part.kind == "attention":
        samples["encoder_hidden_states"] = draw(text_length, config["cross_attention_dim"])
    return samples


def unet_module(config: Mapping[str, Any], architecture: Architecture) -> nn.Module:
    """The whole network on `meta`, in the exporter's wrapper."""
    return UNet(meta_unet(config, architecture)).eval()


def unet_samples(config: Mapping[str, Any], text_length: int, batch: int) -> Samples:
    """The whole network's inputs at that batch size, by name."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, height, width, config["in_channels"], generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, text_length, config["cross_attention_dim"], generator=generator),
    }
