"""How two pictures are compared: the decoder's losses, and SSIM."""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

DecoderLoss = Literal["mse", "mse+l1", "mse+features"]


class EncoderFeatures(nn.Module):
    """A frozen autoencoder's encoder as LPIPS's network (arXiv 1801.03924): every model folder has one.

    The distance is the mean over stages of the squared difference of features of unit length over channels. The
    learned weights of LPIPS are left out.
    """

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.conv_in = vae.encoder.conv_in
        self.stages = vae.encoder.down_blocks
        self.requires_grad_(False)

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """[B, 3, H, W] in [-1, 1] → features of each stage, of unit length over channels."""
        x = self.conv_in(pictures)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(F.normalize(x.float(), dim=1))
        return features

    def distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Mean distance of two batches of pictures, scalar; no gradient reaches `b`."""
        with torch.no_grad():
            wanted = self(b)
        terms = [(x - y).square().sum(1).mean() for x, y in zip(self(a), wanted, strict=True)]
        return torch.stack(terms).mean()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of pictures in [-1, 1], [B, C, H, W] → [B].

    11x11 Gaussian window of σ 1.5, K = (0.01, 0.03), mean over channels and positions; the edges are reflected.
    """
    a, b = a.float().clamp(-1, 1), b.float().clamp(-1, 1)
    x = torch.arange(-5.0, 6.0, device=a.device)
    line = torch.exp(-((x / 1.5) ** 2) / 2)
    line = line / line.sum()
    channels = a.shape[1]
    window = (line[:, None] * line).expand(channels, 1, 11, 11)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(values, [5] * 4, mode="reflect"), window, groups=channels)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    score = score / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1).cpu()
