"""Buckets: the sizes that pictures are brought to, one a shape of picture; each batch of training is of one bucket."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pocketfusion.errors import PocketfusionError

PHONES = ("1:1", "3:4", "9:16")  #: width : height that phones export


class Bucket(NamedTuple):
    """A size of pictures in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def make_buckets(sizes: Sequence[int], aspects: Sequence[str], factor: int) -> tuple[Bucket, ...]:
    """One bucket for each size (pixels of a square's side) and aspect (width:height) of about that square's area.

    Sides are multiples of the autoencoder's `factor` or of an eighth of the size, whichever is more: a UNet of four
    levels then halves the latents without a rest. Raises PocketfusionError for an aspect or size that cannot be.
    """
    found: dict[Bucket, None] = {}
    for size in sizes:
        if size % factor or size < 2 * factor:
            raise PocketfusionError(f"the size {size} is no multiple of {factor}, as the autoencoder's latents ask")
        step = max(factor, size // 8 // factor * factor)
        for aspect in aspects:
            parts = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", aspect)
            ratio = int(parts[1]) / int(parts[2]) if parts else 0.0
            if not 1 / 4 <= ratio <= 4:
                raise PocketfusionError(f"the aspect {aspect!r} is none: give width:height up to 1:4, such as 3:4")
            width, height = size * math.sqrt(ratio), size / math.sqrt(ratio)
            bucket = Bucket(max(1, round(width / step)) * step, max(1, round(height / step)) * step)
            found[Bucket(size, size) if ratio == 1 else bucket] = None
    return tuple(found)


def choose_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> int:
    """The bucket whose shape is nearest to a picture's; of several such the largest that does not enlarge it.

    Nearness is the distance of the logarithms of width / height, so that 2:1 is as far from 1:1 as 1:2 is.
    """
    wanted = math.log(width / height)

    def rank(number: int) -> tuple[float, bool, int]:
        bucket = buckets[number]
        larger, area = bucket.width > width or bucket.height > height, bucket.width * bucket.height
        return round(abs(math.log(bucket.width / bucket.height) - wanted), 2), larger, area if larger else -area

    return min(range(len(buckets)), key=rank)


def fit(picture: Image.Image, width: int, height: int) -> np.ndarray:
    """Centre crop to the shape and Lanczos resize of an RGB picture: uint8 [height, width, 3]."""
    whole = min(picture.width * height, picture.height * width)  # the crop's width times `height`
    across, down = whole // height, whole // width
    left, top = (picture.width - across) // 2, (picture.height - down) // 2
    box = (left, top, left + max(1, across), top + max(1, down))
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))
