"""Up- and downsampling by operations whose meaning no delegate can mistake.

Nearest-neighbour resizing is ambiguous in half pixels and corners, and Mali's delegate is reported wrong at odd
scales: here a picture is doubled by concatenation and reshapes in NHWC order, at most 4-D. A convolution of stride 2
that pads every side by 1 never reads the last row and column of an even picture: here it pads only the sides that it
reads, explicitly, so that a delegate need not choose between its own SAME and the picture's.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from pocketfusion.mobile.rewrites.base import Rewrite, replace
from pocketfusion.mobile.targets import Limits


def double(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] → [B, C, 2H, 2W], every pixel four times."""
    y = x.permute(0, 2, 3, 1)
    batch, height, width, channels = y.shape
    y = torch.cat([y, y], dim=3).reshape(batch, height, 1, 2 * width * channels)
    y = torch.cat([y, y], dim=2).reshape(batch, 2 * height, 2 * width, channels)
    return y.permute(0, 3, 1, 2)


class ConcatUpsample(nn.Module):
    """diffusers' `Upsample2D` (nearest, with a convolution): [B, C, H, W] → twice the size.

    Also to sizes one less, which SD's UNet asks for where a picture of odd size was halved: nearest-neighbour
    indices i * H // (2H - 1) are i // 2 as well.
    """

    def __init__(self, upsample: Upsample2D):
        super().__init__()
        self.conv = upsample.conv

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, **ignored: Any) -> torch.Tensor:
        y = double(hidden_states)
        if output_size is not None:
            y = y[:, :, : output_size[0], : output_size[1]]
        return self.conv(y)


class ExplicitPadConv(nn.Module):
    """A convolution of kernel 3, stride 2 and padding 1: [B, C, H, W] → half the size, rounded up."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        padded = nn.functional.pad(x, (1, width % 2, 1, height % 2))
        return nn.functional.conv2d(padded, self.weight, self.bias, stride=2)


def _upsample(module: nn.Module, limits: Limits) -> int:
    def make(child: nn.Module) -> nn.Module | None:
        plain = isinstance(child, Upsample2D) and child.norm is None and child.use_conv and child.interpolate
        return ConcatUpsample(child) if plain and not child.use_conv_transpose and child.name == "conv" else None

    return replace(module, make)


def _padding(module: nn.Module, limits: Limits) -> int:
    def make(child: nn.Module) -> nn.Module | None:
        if not isinstance(child, nn.Conv2d) or child.groups != 1 or child.dilation != (1, 1):
            return None
        known = (child.kernel_size, child.stride, child.padding) == ((3, 3), (2, 2), (1, 1))
        return ExplicitPadConv(child) if known else None

    return replace(module, make)


UPSAMPLE = Rewrite(
    name="upsample",
    reason="unsupported op",
    summary="nearest-neighbour doubling by concatenation and reshapes",
    source="john-rocky/LiteRT-Models, conversion guide: nearest resize wrong at odd strides on Mali",
    apply=_upsample,
)
PADDING = Rewrite(
    name="padding",
    reason="unsupported op",
    summary="convolutions of stride 2 pad only the sides that they read, explicitly",
    source="this project",
    apply=_padding,
)
