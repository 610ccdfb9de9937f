"""Norms in 4-D, NHWC, without BROADCAST_TO, and in a form whose squares cannot leave fp16.

torch's group normalisation lowers to 5-D tensors and BROADCAST_TO, which the GPU delegate refuses. And in fp16 the
square of a deviation over 255 is infinite: activations of standard deviation 400 come out as NaN. Dividing by a fixed
number first moves that bound but loses small activations, so the deviations are divided by the largest of their group:

    r = d / m,  m = max(max|d|, sqrt(eps)),  d / sqrt(mean(d^2) + eps) = r / sqrt(mean(r^2) + (sqrt(eps) / m)^2)

which is exact, and in which nothing exceeds 1.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from pocketfusion.mobile.devices import Limits
from pocketfusion.mobile.rewrites.passes import Rewrite, replace


def normalise(x: torch.Tensor, axes: tuple[int, ...], eps: float) -> torch.Tensor:
    """`x` with mean 0 and variance 1 over `axes`, nothing leaving half precision's range on the way.

    One axis at a time: delegates take means over single axes, and fp16 sums stay short.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:
        for axis in axes:
            x = x.mean(axis, keepdim=True)
        return x

    centred = x - mean(x)
    largest = centred.abs()
    for axis in axes:
        largest = largest.amax(axis, keepdim=True)
    largest = largest.clamp_min(math.sqrt(eps))
    scaled, root = centred / largest, math.sqrt(eps) / largest
    return scaled * torch.rsqrt(mean(scaled * scaled) + root * root)


class GroupNormNHWC(nn.Module):
    """`nn.GroupNorm` on [B, C, H, W] or [B, C, T] in channels-last order.

    In float32 a channel has one mean and one factor, and tensors of the input's size keep its shape: XNNPACK copies
    what is reshaped, and where both sides of an operation differ in a short last axis (a group's channels) it computes
    that many values at a time. In float16's range it is computed on a [B, positions, groups, C / groups] view.
    """

    def __init__(self, norm: nn.GroupNorm, float16: bool = False):
        super().__init__()
        self.norm, self.float16 = norm, float16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        to_last, to_first = ((0, 2, 3, 1), (0, 3, 1, 2)) if x.ndim == 4 else ((0, 2, 1), (0, 2, 1))
        last = x.permute(to_last)
        y = self._of_groups(last) if self.float16 else self._of_channels(last)
        return y.permute(to_first)

    def _of_groups(self, x: torch.Tensor) -> torch.Tensor:
        groups, channels = self.norm.num_groups, x.shape[-1]
        y = normalise(x.reshape(x.shape[0], -1, groups, channels // groups), (1, 3), self.norm.eps).reshape(x.shape)
        return y * self.norm.weight + self.norm.bias if self.norm.affine else y

    def _of_channels(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - self._mean(x)
        factor = torch.rsqrt(self._mean(centred * centred) + self.norm.eps)
        if not self.norm.affine:
            return centred * factor
        return centred * (factor * self.norm.weight) + self.norm.bias

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """Each channel's group's mean over all positions, [B, 1, (1,) C]."""
        x = x.mean(tuple(range(1, x.ndim - 1)), keepdim=True)
        channels = x.reshape(x.shape[0], 1, self.norm.num_groups, -1)
        # the mean at each of the group's channels, but for rounding: expanded it would be BROADCAST_TO
        return (channels - (channels - channels.mean(3, keepdim=True))).reshape(x.shape)


class ScaledLayerNorm(nn.Module):
    """`nn.LayerNorm` over the last axis, in fp16's range throughout."""

    def __init__(self, norm: nn.LayerNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = normalise(x, (x.ndim - 1,), self.norm.eps)
        if self.norm.elementwise_affine:
            y = y * self.norm.weight
            if self.norm.bias is not None:
                y = y + self.norm.bias
        return y


def _group_norms(module: nn.Module, limits: Limits) -> int:
    return replace(
        module, lambda child: GroupNormNHWC(child, limits.float16) if isinstance(child, nn.GroupNorm) else None
    )


def _layer_norms(module: nn.Module, limits: Limits) -> int:
    def make(child: nn.Module) -> nn.Module | None:
        return ScaledLayerNorm(child) if isinstance(child, nn.LayerNorm) and len(child.normalized_shape) == 1 else None

    return replace(module, make)


GROUP_NORM = Rewrite(
    name="group-norm",
    reason="unsupported op",
    summary="4-D, means over one axis at a time, no BROADCAST_TO; squares within fp16 where activations are fp16",
    source="Squeezing Large-Scale Diffusion Models for Mobile (arXiv 2307.01193); the scaling is this project's",
    apply=_group_norms,
)
LAYER_NORM = Rewrite(
    name="layer-norm",
    reason="fp16 range",
    summary="deviations divided by their largest before they are squared",
    source="this project",
    apply=_layer_norms,
)
