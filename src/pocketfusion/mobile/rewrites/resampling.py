"""Up- and downsampling by operations whose meaning no delegate can mistake.

Nearest-neighbour resizing is ambiguous in half pixels and corners, and Mali's delegate is reported wrong at odd
scales: here a picture is doubled by concatenation and reshapes in NHWC order, at most 4-D. A convolution of stride 2
that pads every side by 1 never reads the last row and column of an even picture: here it pads only the sides that it
reads, explicitly, so that a delegate need not choose between its own SAME and the picture's.

A 3x3 convolution of a doubled picture reads every pixel up to four times. Summing the weights that meet the same pixel
leaves four 2x2 convolutions of the picture as it was, one for each pixel of the four (sub-pixel convolution, Shi et
al., arXiv 1609.07009): 4 products in place of 9, shorter sums, and no Winograd transform, which fp16 does not bear.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from pocketfusion.mobile.devices import Limits
from pocketfusion.mobile.rewrites.passes import Rewrite, replace, view


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


class SubpixelUpsample(nn.Module):
    """The same `Upsample2D` as one 2x2 convolution with four times the outputs, and their interleaving.

    To odd sizes it is `ConcatUpsample`: there the last row's neighbour is padding, not its double.
    """

    def __init__(self, upsample: Upsample2D):
        super().__init__()
        self._other = [ConcatUpsample(upsample)]  # in a list: no part of this module unless it is used
        conv = upsample.conv
        self.channels = conv.out_channels
        with torch.device("meta"):
            self.conv = nn.Conv2d(conv.in_channels, 4 * conv.out_channels, 2, padding=1, bias=conv.bias is not None)
        rows = [_folded(conv.weight.detach(), dim=2, second=second) for second in (False, True)]
        phases = [_folded(row, dim=3, second=second) for row in rows for second in (False, True)]
        self.conv.weight = view(torch.cat(phases))
        if conv.bias is not None:
            self.conv.bias = view(conv.bias.detach().repeat(4))

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None, **ignored: Any) -> torch.Tensor:
        batch, _, height, width = hidden_states.shape
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            other: torch.Tensor = self._other[0](hidden_states, output_size)
            return other
        y = self.conv(hidden_states).permute(0, 2, 3, 1)
        rows = []
        for i in (0, 1):
            first, second = (
                y[:, i : i + height, j : j + width, (2 * i + j) * self.channels : (2 * i + j + 1) * self.channels]
                for j in (0, 1)
            )
            rows.append(torch.cat([first, second], dim=3).reshape(batch, height, 2 * width, self.channels))
        return torch.cat(rows, dim=2).reshape(batch, 2 * height, 2 * width, self.channels).permute(0, 3, 1, 2)


def _folded(weight: torch.Tensor, dim: int, second: bool) -> torch.Tensor:
    """Three weights along `dim` as the two that meet one pixel each, seen from its first or second double."""
    one, two, three = weight.unbind(dim)
    return torch.stack([one + two, three] if second else [one, two + three], dim)


class ExplicitPadConv(nn.Module):
    """A convolution of kernel 3, stride 2 and padding 1: [B, C, H, W] → half the size, rounded up."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        padded = nn.functional.pad(x, (1, width % 2, 1, height % 2))
        return nn.functional.conv2d(padded, self.weight, self.bias, stride=2)


def _plain(child: nn.Module) -> bool:
    """True for nearest-neighbour doubling with a 3x3 convolution and nothing else."""
    plain = isinstance(child, Upsample2D) and child.norm is None and child.use_conv and child.interpolate
    return bool(plain and not child.use_conv_transpose and child.name == "conv")


def _upsample(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: ConcatUpsample(child) if _plain(child) else None)  # type: ignore[arg-type]


def _subpixel(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: SubpixelUpsample(child) if _plain(child) else None)  # type: ignore[arg-type]


def _padding(module: nn.Module, limits: Limits) -> int:
    def make(child: nn.Module) -> nn.Module | None:
        if not isinstance(child, nn.Conv2d) or child.groups != 1 or child.dilation != (1, 1):
            return None
        known = (child.kernel_size, child.stride, child.padding) == ((3, 3), (2, 2), (1, 1))
        return ExplicitPadConv(child) if known else None

    return replace(module, make)


SUBPIXEL = Rewrite(
    name="subpixel-upsample",
    reason="fp16 range",
    summary="doubling and 3x3 convolution as one 2x2 convolution of four times the outputs, interleaved",
    source="Shi et al., arXiv 1609.07009, on sub-pixel convolution; folding the weights is this project's",
    apply=_subpixel,
)
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
