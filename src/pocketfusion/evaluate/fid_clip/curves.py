"""Curves of Fréchet distance against CLIP score over the guidance scale: what one holds, how points are kept, and two
curves compared at equal CLIP score.

As SnapFusion's Figure 1 (arXiv 2306.00980) draws and reads them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.metrics import Estimate, Spread

_GRID = 200  #: CLIP scores looked at between those of the points


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Point(_Record):
    """One system at one guidance scale, with how its pictures were drawn."""

    guidance_scale: float
    num_inference_steps: int
    sampler: str
    precision: str
    pictures: int
    frechet: Estimate | None  #: to the real pictures; None in a `kid_only` run
    kid: Spread
    clip_score: Estimate
    top5: Estimate
    diversity: Estimate | None  #: None if it was not asked for

    @property
    def distance(self) -> float:
        """What is plotted against the CLIP score: the Fréchet distance, or KID where there is none."""
        return self.kid.value if self.frechet is None else self.frechet.value


class Curve(_Record):
    """One system over the guidance scales, ascending; `label` is its line's name."""

    label: str
    system: dict[str, Any]
    points: list[Point]

    @property
    def best(self) -> Point:
        """The point of the lowest distance."""
        return min(self.points, key=lambda point: point.distance)


class Curves(_Record):
    """Everything that an evaluation measured, and how."""

    format: str = "pocketfusion-curves"
    version: int = 1
    protocol: dict[str, Any]
    real: dict[str, Estimate]  #: the ceiling: clip_score and top5 of the captions' own pictures
    curves: list[Curve]
    notes: list[str] = []


def parse_guidance(text: str) -> tuple[float, ...]:
    """Reads `1,2,4.5`, ascending; raises PocketfusionError unless all are different numbers of at least 0."""
    values: list[float] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise PocketfusionError(
                f"--guidance {text!r} holds {part.strip()!r}: give numbers with commas, as 1,2,4.5"
            )
        if value in values:
            raise PocketfusionError(f"--guidance {text!r} holds {part.strip()} twice: give each scale once")
        values.append(value)
    return tuple(sorted(values))


class PointCache:
    """Points on disk, each under a hash of everything that it depends on, so that none is measured twice."""

    def __init__(self, folder: Path):
        self.folder = folder

    def _file(self, key: dict[str, Any]) -> Path:
        digest = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:24]}.json"

    def get(self, key: dict[str, Any]) -> Point | None:
        """The point of `key`, or None if it is not there or damaged."""
        try:
            return Point.model_validate(json.loads(self._file(key).read_text(encoding="utf-8"))["point"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError):
            return None

    def put(self, key: dict[str, Any], point: Point) -> None:
        """Keeps the point, with what it depends on beside it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file(key), {"key": key, "point": point.model_dump()})


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
