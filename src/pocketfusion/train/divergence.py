"""Tells a diverging training from a bad batch, long before NaN."""

from __future__ import annotations

import math
from collections import deque


class DivergenceWatch:
    """Compares the mean of the last `window` losses with the lowest such mean since the run (re)started.

    `suspect` is true as soon as one loss is `factor` times that lowest mean: no checkpoint should be written then.
    """

    def __init__(self, factor: float = 20.0, window: int = 20):
        self.factor, self.lowest, self.suspect = factor, math.inf, False
        self._last: deque[float] = deque(maxlen=window)

    def diverged(self, loss: float) -> bool:
        """Takes a step's loss; true if it is not finite, or a whole window has stayed far above the lowest."""
        if not math.isfinite(loss):
            return True
        self.suspect = loss > self.factor * self.lowest
        self._last.append(loss)
        if len(self._last) < (self._last.maxlen or 0):
            return False
        mean = sum(self._last) / len(self._last)
        self.lowest = min(self.lowest, mean)
        return min(self._last) > self.factor * self.lowest
