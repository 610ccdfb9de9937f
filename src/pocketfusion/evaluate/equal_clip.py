"""Two curves compared at equal CLIP score: the statement that SnapFusion's Figure 1 makes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pocketfusion.evaluate.curves import Curve

_GRID = 200  #: CLIP scores looked at between those of the points


@dataclass(frozen=True)
class EqualClip:
    """Distances of two curves at the CLIP scores that both reach, [K] each; `clip_score` ascends."""

    clip_score: np.ndarray
    a: np.ndarray
    b: np.ndarray

    @property
    def at_or_beyond(self) -> list[tuple[float, float]]:
        """Stretches of CLIP score, first and last, on which B's distance is A's or lower."""
        stretches: list[tuple[float, float]] = []
        before = False
        for clip_score, holds in zip(self.clip_score, self.b <= self.a, strict=True):
            if holds:
                start = stretches.pop()[0] if before else float(clip_score)
                stretches.append((start, float(clip_score)))
            before = bool(holds)
        return stretches

    @property
    def widest_lead(self) -> tuple[float, float]:
        """CLIP score at which B is furthest ahead (or least behind), and A's distance minus B's there."""
        lead = self.a - self.b
        at = int(lead.argmax())
        return float(self.clip_score[at]), float(lead[at])


def at_equal_clip(curve_a: Curve, curve_b: Curve) -> EqualClip | None:
    """The distances of both curves over the CLIP scores that both reach, or None if no score is common.

    Between neighbouring guidance scales a curve is a straight line. Where it reaches a CLIP score more than once, as a
    curve does that turns back at high guidance, its lowest distance there counts.
    """
    a, b = _knots(curve_a), _knots(curve_b)
    low, high = max(a[:, 0].min(), b[:, 0].min()), min(a[:, 0].max(), b[:, 0].max())
    if low > high:
        return None
    scores = np.concatenate([a[:, 0], b[:, 0], np.linspace(low, high, _GRID + 1)])
    scores = np.unique(scores[(scores >= low) & (scores <= high)])
    return EqualClip(scores, _lowest(a, scores), _lowest(b, scores))


def _knots(curve: Curve) -> np.ndarray:
    """CLIP score and distance of each point, [P, 2], in order of guidance."""
    return np.array([(point.clip_score.value, point.distance) for point in curve.points])


def _lowest(knots: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The lowest distance at each score over all stretches between neighbouring points that reach it, [K]."""
    best = np.full(len(scores), np.inf)
    for clip_score, distance in knots:
        best[scores == clip_score] = np.minimum(best[scores == clip_score], distance)
    for (left, first), (right, last) in pairwise(knots):
        if left == right:
            continue
        share = (scores - left) / (right - left)
        inside = (share >= 0) & (share <= 1)
        best[inside] = np.minimum(best[inside], (first + share * (last - first))[inside])
    return best
