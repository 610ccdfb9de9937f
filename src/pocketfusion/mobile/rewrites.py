"""Exact rewrites of modules into forms that phones' GPU delegates take: 4-D, NHWC, no BROADCAST_TO.

torch's group normalisation lowers to BROADCAST_TO, which the GPU delegate refuses (*Squeezing Large-Scale Diffusion
Models for Mobile*, arXiv 2307.01193). Here it is single-axis means over a 4-D view in NHWC order: the same numbers to
rounding, and no slower on CPUs (docs/export.md).
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class GroupNormNHWC(nn.Module):
    """`nn.GroupNorm` on [B, C, H, W] or [B, C, T], computed on a [B, positions, groups, C / groups] view."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        to_last, to_first = ((0, 2, 3, 1), (0, 3, 1, 2)) if x.ndim == 4 else ((0, 2, 1), (0, 2, 1))
        last = x.permute(to_last)
        batch, channels, groups = x.shape[0], x.shape[1], self.norm.num_groups
        y = last.reshape(batch, -1, groups, channels // groups)
        # One axis at a time: delegates take means over single axes, and fp16 sums stay short.
        centred = y - y.mean(1, keepdim=True).mean(3, keepdim=True)
        variance = (centred * centred).mean(1, keepdim=True).mean(3, keepdim=True)
        y = (centred * torch.rsqrt(variance + self.norm.eps)).reshape(last.shape)
        if self.norm.affine:
            y = y * self.norm.weight + self.norm.bias
        return y.permute(to_first)


class SiLUNHWC(nn.Module):
    """SiLU applied in NHWC order, so that the transposes of its neighbours (norm before, convolution after) cancel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4:
            return torch.nn.functional.silu(x)
        return torch.nn.functional.silu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def rewrite(module: nn.Module) -> nn.Module:
    """A copy of `module`, in eval mode, with every GroupNorm and SiLU in the form above. The original is untouched."""
    module = copy.deepcopy(module).eval()
    _replace(module)
    return module


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, GroupNormNHWC(child))
        elif isinstance(child, nn.SiLU):
            setattr(module, name, SiLUNHWC())
        else:
            _replace(child)
