"""Curves of Fréchet distance against CLIP score over the guidance scale, several systems in one harness.

As SnapFusion's Figure 1 (arXiv 2306.00980) draws them, with this project's judge in place of Inception and CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pocketfusion.artefact import write_json
from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import SamplerSettings, System
from pocketfusion.evaluate.harness import POOL
from pocketfusion.evaluate.metrics import (
    Estimate,
    bootstrap,
    clip_score,
    frechet_distance,
    retrieval,
    too_few_for_frechet,
)
from pocketfusion.evaluate.scenes import Scorer
from pocketfusion.evaluate.sets import EvaluationSet, picture_seed

GUIDANCE = (1.0, 2.0, 3.0, 4.5, 6.0, 8.0)

Progress = Callable[[str, int, int], None]  #: what is drawn, pictures done, pictures in all


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Point(_Record):
    """One system at one guidance scale."""

    guidance_scale: float
    frechet: float  #: judge features, to the real pictures of the same captions
    clip_score: Estimate
    top5: Estimate


class Curve(_Record):
    """One system over the guidance scales, ascending; `label` is its line's name."""

    label: str
    system: dict[str, Any]
    points: list[Point]

    @property
    def best(self) -> Point:
        """The point of the lowest Fréchet distance."""
        return min(self.points, key=lambda point: point.frechet)


class Sweep(_Record):
    """Everything that a sweep measured, and how."""

    format: str = "pocketfusion-sweep"
    version: int = 1
    protocol: dict[str, Any]
    real: dict[str, Estimate]  #: the ceiling: clip_score and top5 of the real pictures
    curves: list[Curve]
    notes: list[str] = []


def parse_guidance(text: str) -> tuple[float, ...]:
    """Reads `1,2,4.5`, ascending; raises PocketfusionError unless all are different numbers of at least 0."""
    values = []
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


@dataclass(frozen=True)
class Reference:
    """What every system is measured against: captions, seeds, and the judge's view of the real pictures."""

    sets: tuple[EvaluationSet, ...]
    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    features: np.ndarray  #: of the real pictures, [N, F]
    embeddings: np.ndarray  #: of the real pictures, [N, E]
    texts: np.ndarray  #: of the captions, [N, E]

    @classmethod
    def of(cls, data: CaptionedImages, judge: Scorer, sets: Sequence[EvaluationSet], seed: int) -> Reference:
        """All sets pooled, in their order. Raises PocketfusionError if they are too few for a Fréchet distance."""
        indices = np.concatenate([chosen.indices for chosen in sets])
        captions = tuple(caption for chosen in sets for caption in chosen.captions)
        features, embeddings = judge.image_features(np.asarray(data.images[indices]))
        absent = too_few_for_frechet(len(indices), features.shape[1])
        if absent:
            names = ", ".join(chosen.name for chosen in sets)
            raise PocketfusionError(f"{names}: {absent}; raise --samples or name more --sets")
        seeds = tuple(picture_seed(seed, data.rows[i]["id"]) for i in indices)
        return cls(tuple(sets), captions, seeds, features, embeddings, judge.text_embeddings(list(captions)))

    def scores(self, embeddings: np.ndarray) -> dict[str, Estimate]:
        """CLIP score and top-5 of pictures with these embeddings, [N, E]."""
        ranked = retrieval(embeddings, self.texts, self.captions, ks=(5,), pool=POOL)
        return {"clip_score": bootstrap(clip_score(embeddings, self.texts)), "top5": bootstrap(ranked.hits[5])}


def measure(
    system: System,
    judge: Scorer,
    reference: Reference,
    sampler: SamplerSettings,
    on_batch: Callable[[int], None] | None = None,
) -> Point:
    """Draws the reference's captions from its seeds and scores the pictures."""
    images = system.draw(reference.captions, reference.seeds, sampler, on_batch)
    features, embeddings = judge.image_features(images)
    distance = frechet_distance(features, reference.features)
    return Point(guidance_scale=sampler.guidance_scale, frechet=distance, **reference.scores(embeddings))


class PointCache:
    """Points on disk, each under a hash of everything that it depends on, so that a killed sweep goes on."""

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


def sweep(
    systems: Sequence[tuple[str, dict[str, Any], Callable[[], System]]],
    judge: Scorer,
    reference: Reference,
    guidance: Sequence[float],
    sampler: SamplerSettings,
    protocol: dict[str, Any],
    cache: PointCache,
    progress: Progress = lambda what, done, total: None,
) -> Sweep:
    """One curve for each system, given as label, identity and what opens it; cached points are not drawn again.

    `protocol` is what all points depend on besides system and guidance; `sampler`'s own guidance is not used.
    """
    count = len(reference.captions)
    total, curves = count * len(systems) * len(guidance), []
    done = 0
    for label, identity, open_system in systems:
        points, system = [], None
        for scale in guidance:
            key = {"protocol": protocol, "system": identity, "guidance_scale": scale}
            point = cache.get(key)
            if point is None:
                system = system or open_system()
                what = f"{label} at guidance {scale:g}"
                at = SamplerSettings(sampler.num_inference_steps, scale, sampler.batch)
                progress(what, done, total)

                def advance(drawn: int, what: str = what, before: int = done) -> None:
                    progress(what, before + drawn, total)

                point = measure(system, judge, reference, at, advance)
                cache.put(key, point)
            done += count
            points.append(point)
            progress(label, done, total)
        curves.append(Curve(label=label, system=identity, points=points))
    return Sweep(protocol=protocol, real=reference.scores(reference.embeddings), curves=curves)
