"""How alike two pictures are: pure functions."""

from __future__ import annotations

import numpy as np

EQUAL = 100.0  #: dB that stand for equal pictures, whose PSNR is infinite


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of pictures uint8 [H, W, 3] in dB, at most 100 (equal)."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return EQUAL if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of pictures uint8 [H, W, 3] of 11 pixels or more, 1 for equal ones.

    Of Wang et al. (2004), with their constants and window, a Gaussian of 11 pixels and sigma 1.5: the mean over where
    it fits and over colours.
    """
    distance = np.arange(-5, 6)
    window = np.exp(-(distance**2) / (2 * 1.5**2))
    window /= window.sum()

    def blurred(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            values = np.lib.stride_tricks.sliding_window_view(values, len(window), axis=axis) @ window
        return values

    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    levels = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return float(np.mean(levels * (2 * covariance + c2) / (var_x + var_y + c2)))
