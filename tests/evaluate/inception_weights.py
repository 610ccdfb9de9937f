"""Weights of FID's Inception-v3 that any machine makes alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch


def seeded_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Normal numbers by numpy's PCG64, kept from vanishing or exploding over the network's depth; sorted by name."""
    rng = np.random.default_rng(2015)
    made = {}
    for name in sorted(shapes):
        values = rng.standard_normal(shapes[name], dtype=np.float32)
        if name.endswith("conv.weight"):
            values *= (2 / np.prod(shapes[name][1:])) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            values = 1 + 0.1 * np.abs(values)
        else:  # bn.bias, running_mean
            values *= 0.1
        made[name] = torch.from_numpy(values.astype(np.float32))
    return made


def golden_images() -> np.ndarray:
    """Waves and noise, uint8 [2, 299, 299, 3]."""
    y, x = np.mgrid[:299, :299]
    waves = np.stack([128 + 120 * np.sin((x * (1 + k) + y * y / 50) / 20) for k in range(3)], axis=2)
    noise = np.random.default_rng(0).integers(0, 256, (299, 299, 3))
    return np.stack([waves, noise]).astype(np.uint8)
