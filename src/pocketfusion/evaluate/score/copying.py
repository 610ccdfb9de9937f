"""How near each picture is to a training picture: a model that copies draws nearer than real held-out pictures are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

_SIZE = 32
_BLOCK = 2048


def thumbnails(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] → box-averaged uint8 [N, 32, 32, 3]."""
    small = [Image.fromarray(np.asarray(image)).resize((_SIZE, _SIZE), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(picture) for picture in small])


@dataclass(frozen=True)
class Gallery:
    """The training pictures: where they are in the data, small copies, judge features, and whether a mirrored copy
    was trained on too."""

    indices: np.ndarray  #: [M]
    small: np.ndarray  #: uint8 [M, 32, 32, 3]
    features: np.ndarray  #: fp32 [M, F]
    flip: np.ndarray  #: bool [M]


@dataclass(frozen=True)
class Nearest:
    """For each of N pictures, its nearest training picture."""

    rms: np.ndarray  #: root mean square difference at 32×32 pixels, 0 to 255
    position: np.ndarray  #: the gallery position that `rms` is of
    cosine: np.ndarray  #: highest cosine of judge features (of any training picture)


@dataclass(frozen=True)
class Pair:
    """A generated picture and the training picture nearest to it, uint8 [H, W, 3], with their captions."""

    generated: np.ndarray
    training: np.ndarray
    prompt: str
    caption: str
    rms: float


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def nearest_training(
    small: np.ndarray, features: np.ndarray, gallery: Gallery, own: np.ndarray | None = None
) -> Nearest:
    """Nearest training pictures of pictures with thumbnails uint8 [N, 32, 32, 3] and judge features [N, F].

    A mirrored training picture counts where training mirrored it. `own` [N]: data indices of these pictures where they
    are training pictures themselves; that one is left out, so that a real picture is not its own copy.
    """
    count = len(small)
    own = np.full(count, -1) if own is None else own
    excluded = gallery.indices[None] == own[:, None]
    flat = gallery.small.reshape(len(gallery.small), -1)
    best, position = np.full(count, np.inf), np.zeros(count, np.int64)
    for mirrored in (False, True):
        query = (small[:, :, ::-1] if mirrored else small).reshape(count, -1).astype(np.float32)
        for start in range(0, len(flat), _BLOCK):
            block = flat[start : start + _BLOCK].astype(np.float32)
            squared = (query**2).sum(1)[:, None] + (block**2).sum(1)[None] - 2 * query @ block.T
            if mirrored:
                squared[:, ~gallery.flip[start : start + _BLOCK]] = np.inf
            squared[excluded[:, start : start + _BLOCK]] = np.inf
            winner = squared.argmin(axis=1)
            value = squared[np.arange(count), winner]
            nearer = value < best
            best[nearer], position[nearer] = value[nearer], start + winner[nearer]
    cosine = _unit(features) @ _unit(gallery.features).T
    cosine[excluded] = -1.0
    return Nearest(_exact_rms(small, gallery, position), position, cosine.max(axis=1))


def _exact_rms(small: np.ndarray, gallery: Gallery, position: np.ndarray) -> np.ndarray:
    """RMS without the rounding of |a|² + |b|² − 2ab, which hides exact copies."""
    target = gallery.small[position].astype(np.float64)
    plain = np.sqrt(((small - target) ** 2).mean(axis=(1, 2, 3)))
    mirrored = np.sqrt(((small[:, :, ::-1] - target) ** 2).mean(axis=(1, 2, 3)))
    return np.where(gallery.flip[position], np.minimum(plain, mirrored), plain)
