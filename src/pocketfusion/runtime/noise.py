"""Noise of a seed: the same in every room and on every machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class NoiseStream:
    """Standard normal latents of a seed, [height, width, channels] float32 each: numpy's PCG64, one call a draw.

    The first are the starting noise; samplers that add noise take the following ones, a draw for each step that does.
    """

    def __init__(self, seed: int, height: int, width: int, channels: int) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._shape = (height, width, channels)

    def draw(self) -> npt.NDArray[np.float32]:
        """The next latents of the stream."""
        return self._generator.standard_normal(self._shape, np.float32)


def seeded_noise(seed: int, height: int, width: int, channels: int) -> npt.NDArray[np.float32]:
    """The starting noise of `seed`, [height, width, channels]."""
    return NoiseStream(seed, height, width, channels).draw()
