"""Linear layers as 1x1 convolutions, and those too large for a device as several.

A linear layer on tokens [B, T, C] is a 1x1 convolution on [B, 1, T, C]: the same numbers with the same weights.
Phones' delegates refused FULLY_CONNECTED on long token lists when *Squeezing* was written; today's take it.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.activations import GEGLU
from torch import nn

from pocketfusion.mobile.devices import Limits
from pocketfusion.mobile.rewrites.passes import Rewrite, replace, view


class PointwiseConv(nn.Module):
    """`nn.Linear` on [B, C], [B, T, C] or [B, H, W, C] as a 1x1 convolution in NHWC."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = view(linear.weight[:, :, None, None])
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lead = x.shape[:-1]
        image = x.reshape(lead[0], *((1,) * (4 - x.ndim)), *x.shape[1:]).permute(0, 3, 1, 2)
        y = nn.functional.conv2d(image, self.weight, self.bias).permute(0, 2, 3, 1)
        return y.reshape(*lead, self.weight.shape[0])


class SerialLinear(nn.Module):
    """`nn.Linear` in `count` parts along its outputs, concatenated: each part has its own weight."""

    def __init__(self, linear: nn.Linear, count: int):
        super().__init__()
        weights = linear.weight.chunk(count)
        biases = [None] * len(weights) if linear.bias is None else linear.bias.chunk(count)
        self.parts = nn.ModuleList(part_of(w, b) for w, b in zip(weights, biases, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)


class SplitGEGLU(nn.Module):
    """diffusers' `GEGLU` with two projections, value and gate, in place of one that is then cut in half."""

    def __init__(self, geglu: GEGLU):
        super().__init__()
        self.proj = SerialLinear(geglu.proj, 2)
        self.gelu = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj.parts
        return value(x) * self.gelu(gate(x))


def part_of(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A linear layer of a slice of another's weight and bias, which it shares."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = view(weight)
    if bias is not None:
        linear.bias = view(bias)
    return linear


def _pointwise(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: PointwiseConv(child) if isinstance(child, nn.Linear) else None)


def _geglu(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: SplitGEGLU(child) if isinstance(child, GEGLU) else None)


def _serial(module: nn.Module, limits: Limits) -> int:
    def make(child: nn.Module) -> nn.Module | None:
        if not isinstance(child, nn.Linear) or limits.weight_bytes is None:
            return None
        count = math.ceil(child.weight.numel() * limits.bytes_per_value / limits.weight_bytes)
        return SerialLinear(child, count) if count > 1 else None

    return replace(module, make)


GEGLU_SPLIT = Rewrite(
    name="geglu",
    reason="memory",
    summary="two projections instead of one of double width that is cut in half",
    source="this project",
    apply=_geglu,
)
SERIALISE_MATMUL = Rewrite(
    name="serialise-matmul",
    reason="memory",
    summary="linear layers whose weight exceeds the limit in parts along their outputs",
    source="Squeezing Large-Scale Diffusion Models for Mobile (arXiv 2307.01193), which does so for convolutions",
    apply=_serial,
)
LINEAR_TO_CONV = Rewrite(
    name="linear-to-conv",
    reason="unsupported op",
    summary="linear layers as 1x1 convolutions",
    source="Squeezing Large-Scale Diffusion Models for Mobile (arXiv 2307.01193)",
    apply=_pointwise,
)
