"""A picture of latents for next to nothing: one colour for each of their positions, linear in its channels.

Widely used in live previews; the map is fitted where the bundle is made (`mobile.preview_fit`).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from pocketfusion.runtime.specs import Strict

Array = npt.NDArray[np.float32]
_Coefficient = Annotated[float, Field(ge=-1e4, le=1e4)]
_Colour = Annotated[list[_Coefficient], Field(min_length=3, max_length=3)]


class LinearPreview(Strict):
    """red, green and blue in the decoder's range [-1, 1]: the sampler's latents [H, W, C] times `matrix` [C, 3], plus
    `bias` [3], clipped.

    `psnr_db` and `r2` (of 1: the share of the colours' variance that it explains) are of two drawn pictures that it
    was not fitted on, against the decoder's averaged over the pixels of each position.
    """

    matrix: list[_Colour] = Field(min_length=1, max_length=2**14)
    bias: _Colour
    psnr_db: float
    r2: float = Field(le=1)

    def colours(self, latents: Array) -> Array:
        """[..., C] → [..., 3], in [-1, 1]."""
        return np.clip(latents @ np.array(self.matrix, np.float32) + np.array(self.bias, np.float32), -1, 1)

    def image(self, latents: Array, size: tuple[int, int]) -> Image.Image:
        """The picture of latents [1, H, W, C], scaled up to `size`, width and height in pixels."""
        bytes_ = np.round((self.colours(latents[0]) / 2 + 0.5) * 255).astype(np.uint8)
        return Image.fromarray(bytes_).resize(size, Image.Resampling.BILINEAR)
