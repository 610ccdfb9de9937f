"""Decoding latents larger than the decoder's input: overlapping tiles, their pictures blended over the overlap.

A decoder's memory grows with its picture; a UNet's with the square of its tokens, so the decoder's picture is the one
that is cut. Group normalisation and the middle attention see one tile only, so a tiled picture differs from an untiled
one everywhere, a little (docs/memory.md has figures); blending hides where tiles meet. The scheme is diffusers'
`tiled_decode` (a quarter of overlap, linear weights), but the last tile ends at the edge instead of being smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pocketfusion.errors import PocketfusionError

Array = npt.NDArray[np.float32]

OVERLAP = 0.25  #: of a tile, at least, that it shares with its neighbour


def check_tile(tile: int, height: int, width: int) -> None:
    """Raises PocketfusionError unless a tile of `tile` latents fits into latents of `height` by `width`."""
    if tile < 1:
        raise PocketfusionError(f"the decoder's tile is {tile} latents: choose 1 to {min(height, width)}")
    if tile > min(height, width):
        raise PocketfusionError(
            f"the decoder's tile is {tile} latents and the picture has {height}x{width}: choose a tile of at most "
            f"{min(height, width)}, or none"
        )


def starts(length: int, tile: int) -> list[int]:
    """First indices of the tiles along an extent: evenly spread, with at least `OVERLAP`, the last at the edge."""
    step = max(1, int(tile * (1 - OVERLAP)))
    count = 1 + -(-(length - tile) // step)
    return [round(i * (length - tile) / (count - 1)) for i in range(count)] if count > 1 else [0]


def decode_tiled(decode: Callable[[Array], Array], latents: Array, tile: tuple[int, int]) -> Array:
    """The image [1, f H, f W, 3] of latents [1, H, W, C]; `decode` makes [1, f h, f w, 3] of a tile [1, h, w, C]."""
    rows, columns = (starts(length, size) for length, size in zip(latents.shape[1:3], tile, strict=True))
    if len(rows) == len(columns) == 1:
        return decode(latents)
    image = total = None
    for top in rows:
        for left in columns:
            part = decode(latents[:, top : top + tile[0], left : left + tile[1]])
            factor = part.shape[1] // tile[0]
            if image is None or total is None:
                height, width = (factor * length for length in latents.shape[1:3])
                image = np.zeros((1, height, width, part.shape[3]), np.float32)
                total = np.zeros((1, height, width, 1), np.float32)
            weight = _ramp(top, rows, tile[0], factor)[:, None, None] * _ramp(left, columns, tile[1], factor)[:, None]
            where = np.s_[:, factor * top : factor * (top + tile[0]), factor * left : factor * (left + tile[1])]
            image[where] += weight * part
            total[where] += weight
    assert image is not None and total is not None
    return np.divide(image, total, dtype=np.float32)


def _ramp(start: int, every: list[int], tile: int, factor: int) -> Array:
    """Weights [factor tile] along one extent: 1, falling linearly to near 0 where a neighbour overlaps."""
    index = every.index(start)
    weight = np.ones(factor * tile, np.float32)
    if index > 0:
        shared = factor * (every[index - 1] + tile - start)
        weight[:shared] = np.minimum(weight[:shared], (np.arange(shared) + 0.5) / shared)
    if index < len(every) - 1:
        shared = factor * (start + tile - every[index + 1])
        weight[-shared:] = np.minimum(weight[-shared:], (np.arange(shared)[::-1] + 0.5) / shared)
    return weight
