"""Fits the manifest's linear preview: colours of latents without a decoder.

The gate draws two pictures, too few to fit on (an emoji model's: 13 dB on other pictures). So the map is fitted on
pictures of coloured discs, encoded by the folder's own autoencoder and decoded by the bundle's decoder (18.8 dB on the
same pictures; on 24 drawn ones 19.1 dB), and measured on the two.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.mobile.inputs import GateInputs
from pocketfusion.mobile.wrappers import nhwc
from pocketfusion.models.tiny_autoencoder import latents_of
from pocketfusion.runtime.specs import LinearPreview

#: Pictures of so many latents a side, drawn with so many discs each, encoded so many at a time.
_PICTURES, _SIDE, _DISCS, _BATCH = 32, 8, 4, 8
_RIDGE = 1e-3  #: of the latents' mean square, on the map but not on its bias


def discs(count: int, side: int) -> torch.Tensor:
    """`count` pictures [N, 3, side, side] in [-1, 1]: discs of random colours on a random background."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side] / side
    pictures = np.empty((count, 3, side, side), np.float32)
    for picture in pictures:
        picture[:] = rng.uniform(-1, 1, (3, 1, 1))
        for _ in range(_DISCS):
            (y, x), radius = rng.uniform(0, 1, 2), rng.uniform(0.1, 0.4)
            picture[:, (rows - y) ** 2 + (columns - x) ** 2 < radius**2] = rng.uniform(-1, 1, (3, 1))
    return torch.from_numpy(pictures)


@torch.no_grad()
def fit_preview(vae: Any, decoder: nn.Module, factor: int, reference: GateInputs) -> LinearPreview | None:
    """The map from latents to the colours that `decoder` (the wrapped one, whole latents) gives them.

    `vae`: the autoencoder whose latents they are, not always the decoder's. `factor`: pixels of a latent's side. None
    where the network's numbers allow none.
    """
    latents, images = [], []
    for part in discs(_PICTURES, _SIDE * factor).split(_BATCH):
        z = nhwc(latents_of(vae, part))
        latents.append(z.numpy())
        images.append(decoder(latents=z)["image"].numpy())
    x, y = np.concatenate(latents).astype(np.float64), _averaged(np.concatenate(images), factor)
    x = np.concatenate([x, np.ones((*x.shape[:3], 1))], axis=3).reshape(-1, x.shape[3] + 1)
    y = y.reshape(-1, 3)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    ridge = np.full(x.shape[1], _RIDGE * np.square(x[:, :-1]).sum() / (x.shape[1] - 1))
    ridge[-1] = 0
    solution = np.linalg.lstsq(x.T @ x + np.diag(ridge), x.T @ y, rcond=None)[0]
    if np.abs(solution).max() > 1e4:
        return None
    fitted = LinearPreview.made(
        matrix=np.round(solution[:-1], 5).tolist(), bias=np.round(solution[-1], 5).tolist(), psnr_db=0.0, r2=0.0
    )
    drawn = np.concatenate([one["latents"] for one in reference.inputs["decoder"]])
    expected = _averaged(np.concatenate(list(reference.outputs["decoder"])), factor)
    error = float(np.square(fitted.colours(drawn) - expected).mean())
    variance = float(np.square(expected - expected.mean(axis=(0, 1, 2))).mean())
    psnr = min(200.0, 10 * math.log10(4 / error)) if error else 200.0
    return fitted.model_copy(
        update={"psnr_db": round(psnr, 2), "r2": round(1 - error / variance, 4) if variance else 0.0}
    )


def _averaged(images: np.ndarray, factor: int) -> np.ndarray:
    """[N, f H, f W, 3] in the picture's range → [N, H, W, 3], each position's mean."""
    count, height, width, channels = images.shape
    parts = np.clip(images, -1, 1).reshape(count, height // factor, factor, width // factor, factor, channels)
    return parts.astype(np.float64).mean(axis=(2, 4))
