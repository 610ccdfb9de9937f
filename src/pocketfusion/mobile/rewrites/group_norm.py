"""Group normalisation in 4-D, NHWC, without BROADCAST_TO."""

from __future__ import annotations

import torch
from torch import nn

from pocketfusion.mobile.rewrites.base import Rewrite, replace
from pocketfusion.mobile.targets import Limits


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


def apply(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: GroupNormNHWC(child) if isinstance(child, nn.GroupNorm) else None)


GROUP_NORM = Rewrite(
    name="group-norm",
    reason="unsupported op",
    summary="group normalisation in 4-D without BROADCAST_TO",
    source="Squeezing Large-Scale Diffusion Models for Mobile (arXiv 2307.01193), section 3.1",
    apply=apply,
)
