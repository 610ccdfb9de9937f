"""The sinusoidal embedding of a timestep, for UNets that take it as an input."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from pocketfusion.runtime.specs import TimeEmbedding

Array = npt.NDArray[np.float32]


def timestep_embedding(timestep: float, spec: TimeEmbedding) -> Array:
    """`timestep_embedding` [1, spec.dim], as diffusers' `get_timestep_embedding` gives it (max_period 10,000).

    Sin then cos (or cos then sin, flipped) of t / 10000^(i / (dim/2 - shift)). The angles are computed in float32, as
    there: at t = 1000 its rounding is part of what the UNet was trained with. Functions are computed in float64 and
    then rounded: numpy's own float32 ones differ by their last bit from processor to processor.
    """
    half = spec.dim // 2
    exponent = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32)
    frequencies = np.exp((exponent / np.float32(half - spec.downscale_freq_shift)).astype(np.float64))
    angles = (np.float32(timestep) * frequencies.astype(np.float32)).astype(np.float64)
    parts = [np.sin(angles), np.cos(angles)]
    values = np.concatenate([*(parts[::-1] if spec.flip_sin_to_cos else parts), np.zeros(spec.dim % 2, np.float32)])
    return values.astype(np.float32)[None]
