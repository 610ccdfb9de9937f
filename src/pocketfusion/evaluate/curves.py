"""Curves of Fréchet distance against CLIP score over the guidance scale: what one holds, and how points are kept.

As SnapFusion's Figure 1 (arXiv 2306.00980) draws them.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.distances import Spread
from pocketfusion.evaluate.metrics import Estimate


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
