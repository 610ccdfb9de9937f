"""Starting noise: a seed means the same picture in every room and on every machine."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def seeded_noise(seed: int, height: int, width: int, channels: int) -> npt.NDArray[np.float32]:
    """Standard normal latents of `seed`, [height, width, channels], by numpy's PCG64."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal((height, width, channels), np.float32)
