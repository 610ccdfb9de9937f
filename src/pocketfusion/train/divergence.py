"""Tells a diverging training from a bad batch, long before NaN."""

from __future__ import annotations

import math
from collections import deque


class DivergenceWatch:
    """Compares the mean of the last `window` losses with the lowest such mean since the run (re)started.

    `suspect` is true as soon as one loss is `factor` times that lowest mean, or a step was skipped because its
    gradients were not finite: no checkpoint should be written then. `skipped` counts such steps in a row.
    """

    def __init__(self, factor: float = 20.0, window: int = 20, patience: int = 5):
        self.factor, self.patience, self.lowest = factor, patience, math.inf
        self.suspect, self.skipped = False, 0
        self._last: deque[float] = deque(maxlen=window)

    def diverged(self, loss: float, gradient_norm: float = 0.0) -> bool:
        """Takes a step's loss and gradient norm; true if `patience` steps in a row had no finite gradients, a loss is
        not finite though its gradients are, or a whole window has stayed far above the lowest."""
        if not math.isfinite(gradient_norm):
            self.suspect, self.skipped = True, self.skipped + 1
            return self.skipped >= self.patience
        self.skipped = 0
        if not math.isfinite(loss):
            return True
        self.suspect = loss > self.factor * self.lowest
        self._last.append(loss)
        if len(self._last) < (self._last.maxlen or 0):
            return False
        mean = sum(self._last) / len(self._last)
        self.lowest = min(self.lowest, mean)
        return min(self._last) > self.factor * self.lowest
