"""Training pictures as a decoder's samples: what the encoder makes of them, and the pictures themselves as targets.

Drawn latents teach a small decoder what its UNet gives it, but only as well as the teacher draws it; pictures say what
is right, edges and flat colours above all.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.recipe import DataSettings
from pocketfusion.train.autoencoder import to_tensor
from pocketfusion.train.batch import Batch
from pocketfusion.train.cache import cache_latents


class EncodedPictures:
    """The training pictures by row; `pools` are rows and their shares, as the other stages draw them."""

    def __init__(self, settings: DataSettings, data: CaptionedImages):
        train, scenes = data.indices(["train"]), np.empty(0, dtype=int)
        if "train_scene" in data.splits and settings.scene_share:
            scenes = data.indices(["train_scene"])
        self.data = data
        self.indices = np.concatenate([train, scenes])
        self.flip = data.flips[self.indices] & settings.flip
        rows = np.split(np.arange(len(self.indices)), [len(train)])
        self.pools = list(zip(rows, (1 - settings.scene_share, settings.scene_share), strict=True))

    def prepare(self, vae: AutoencoderKL, vae_hash: str, cache: Path, device: torch.device) -> None:
        """Encodes the pictures, all processes together; later runs find them. `vae_hash`: of the encoder."""
        self.latents = cache_latents(vae, vae_hash, self.data, cache, device)

    def take(self, rows: np.ndarray, batch: Batch, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents [R, C, h, w], sampled from mean and deviation, and pictures [R, 3, H, W], some mirrored that may be.

        `chosen` [part]: which of the batch's samples the `rows` [R] are. The latents are the autoencoder's, unscaled.
        """
        mirrored = (batch.rand() < 0.5)[chosen] & torch.from_numpy(self.flip[rows])
        latents = self.latents.latents(self.indices[rows], mirrored.numpy())
        mean, std = torch.from_numpy(latents).float().chunk(2, dim=1)
        pixels = to_tensor(self.data.images[self.indices[rows]])
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
        return mean + std * batch.randn(*mean.shape[1:])[chosen], pixels
