"""Convolutions too large for a device, as several smaller ones.

*Squeezing* reports that the delegate could not allocate a 2-D image for very large convolutions, gives 3x3,
32x32x1920 -> 640 as the example, and needed two parts along the input channels or eight along the output channels.
TensorFlow Lite's GPU delegate explains all three numbers: it computes a 3x3 convolution of at least 64 tiles of 4x4
(32x32) by Winograd's algorithm, which keeps the transformed input as [36, tiles, C], an image of height
36 * ceil(C / 4). That is 17,280 for 1920 channels, above Adreno's 16,384, and 8,640 for half of them. Along the output
channels the input stays whole, until the parts fall under 32 * 4 channels, where Adreno does without Winograd: eight
parts of 80. (`IsRecommendedForWinograd4x4To6x6` and `WinogradFromNode` in gpu/common/selectors.)

In half precision the split is also more exact: a delegate that sums in fp16 is off by 3 dB less with each halving.

On CPUs the same split is faster: XNNPACK reads the weights of 16 output channels, 16 * 9 * C values, again for every
few pixels. From about 640 input channels they fall out of a core's second-level cache, and a convolution takes twice
as long as its parts (docs/mobile.md).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from pocketfusion.mobile.devices import Limits
from pocketfusion.mobile.rewrites.passes import Rewrite, replace, view

#: Values of a transformed tile in Winograd's F(4x4, 3x3), and the channels of a texel.
_WINOGRAD, _TEXEL = 36, 4
#: Output channels of XNNPACK's inner loop, and the bytes of its float32 weights.
_TILE, _VALUE = 16, 4
#: Parts of the input channels are a multiple of this, which vector units and texels like.
_ALIGNED = 32


def parts_needed(conv: nn.Conv2d, limits: Limits) -> int:
    """Into how many parts `limits` ask to split `conv` along its input channels."""
    parts = 1
    winograd = conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.dilation == (1, 1)
    if limits.image2d is not None and winograd:
        largest = limits.image2d // _WINOGRAD * _TEXEL
        parts = max(parts, math.ceil(conv.in_channels / largest))
    if limits.weight_bytes is not None:
        parts = max(parts, math.ceil(conv.weight.numel() * limits.bytes_per_value / limits.weight_bytes))
    if limits.sum_terms is not None:
        parts = max(parts, math.ceil(conv.weight[0].numel() / limits.sum_terms))
    if limits.cache_bytes is not None:
        inner = conv.weight[0].numel() * _TILE * _VALUE
        parts = max(parts, math.ceil(inner / (limits.cache_bytes / 2)))
    return min(parts, conv.in_channels)


class SerialConv(nn.Module):
    """`nn.Conv2d` in `count` parts: along its inputs, whose results are added, or its outputs, joined."""

    def __init__(self, conv: nn.Conv2d, count: int, along: Literal["inputs", "outputs"] = "inputs"):
        super().__init__()
        self.along = along
        axis, channels = (1, conv.in_channels) if along == "inputs" else (0, conv.out_channels)
        size = math.ceil(channels / count)
        if channels >= count * _ALIGNED:
            size = math.ceil(size / _ALIGNED) * _ALIGNED
        weights = conv.weight.split(size, dim=axis)
        self.channels = [weight.shape[1] for weight in weights]
        biases: list[torch.Tensor | None] = [None] * len(weights)
        if conv.bias is not None:
            biases = [conv.bias, *biases[1:]] if along == "inputs" else list(conv.bias.split(size))
        self.parts = nn.ModuleList(_part(conv, w, b) for w, b in zip(weights, biases, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.along == "outputs":
            return torch.cat([part(x) for part in self.parts], dim=1)
        pieces = x.split(self.channels, dim=1)
        y = self.parts[0](pieces[0])
        for part, piece in zip(self.parts[1:], pieces[1:], strict=True):
            y = y + part(piece)
        return y


def _part(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    with torch.device("meta"):
        part = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            conv.kernel_size,  # type: ignore[arg-type]  # torch types the attribute more widely than the argument
            stride=conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            bias=bias is not None,
        )
    part.weight = view(weight)
    if bias is not None:
        part.bias = view(bias)
    return part


def _apply(module: nn.Module, limits: Limits) -> int:
    def make(child: nn.Module) -> nn.Module | None:
        if not isinstance(child, nn.Conv2d) or child.groups != 1:
            return None
        count = parts_needed(child, limits)
        return SerialConv(child, count) if count > 1 else None

    return replace(module, make)


SERIALISE_CONV = Rewrite(
    name="serialise-conv",
    reason="memory",
    summary="convolutions beyond the limits in parts along their input channels, whose results are added",
    source="Squeezing Large-Scale Diffusion Models for Mobile (arXiv 2307.01193)",
    apply=_apply,
)
