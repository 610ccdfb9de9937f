"""From pictures in the store to a point of a curve."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from pocketfusion.artefact import atomic_file
from pocketfusion.evaluate.curves import Point
from pocketfusion.evaluate.distances import RealFeatures, diversity, frechet_estimate, kid
from pocketfusion.evaluate.drawing import Plan, load
from pocketfusion.evaluate.extractors import Extractor
from pocketfusion.evaluate.harness import POOL
from pocketfusion.evaluate.images import CaptionedReference
from pocketfusion.evaluate.metrics import Estimate, bootstrap, clip_score, retrieval
from pocketfusion.evaluate.store import Shelf, Wanted
from pocketfusion.evaluate.systems import SystemSpec

_CHUNK = 512

OnScored = Callable[[int], None]  #: how many more pictures went through the extractor


def _extract(
    get: Callable[[np.ndarray], np.ndarray], count: int, extractor: Extractor, on_scored: OnScored
) -> tuple[np.ndarray, np.ndarray]:
    """Features [count, F] and embeddings [count, E] of pictures that `get` gives by number, a chunk at a time."""
    features, embeddings = [], []
    for start in range(0, count, _CHUNK):
        numbers = np.arange(start, min(start + _CHUNK, count))
        part = extractor.image_features(get(numbers))
        features.append(part[0])
        embeddings.append(part[1])
        on_scored(len(numbers))
    return np.concatenate(features), np.concatenate(embeddings)


@dataclass(frozen=True)
class RealSide:
    """What the extractor says of the real pictures and of the captions."""

    real: RealFeatures  #: [M, F], of the pictures that FID and KID compare with
    embeddings: np.ndarray  #: of the captions' own pictures, [N, E]
    texts: np.ndarray  #: of the captions, [N, E]
    captions: tuple[str, ...]

    @classmethod
    def of(
        cls, reference: CaptionedReference, extractor: Extractor, cache: Path, on_scored: OnScored = lambda count: None
    ) -> RealSide:
        """Kept in the folder `cache`, since real pictures can be many."""
        captions = tuple(reference.captions)
        key = json.dumps({"extractor": extractor.identity(), "reference": reference.fingerprint}, sort_keys=True)
        file = cache / f"real-{sha256(key.encode()).hexdigest()[:24]}.npz"
        try:
            with np.load(file) as kept:
                return cls(RealFeatures(kept["features"]), kept["embeddings"], kept["texts"], captions)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # not there, or damaged
        features, embeddings = _extract(reference.real_images, reference.real_count, extractor, on_scored)
        if reference.real_images != reference.images:  # one method where both sides are the same pictures
            _, embeddings = _extract(reference.images, len(captions), extractor, on_scored)
        texts = extractor.text_embeddings(reference.captions)
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            np.savez(partial, features=features, embeddings=embeddings, texts=texts)
        return cls(RealFeatures(features), embeddings, texts, captions)

    def scores(self, embeddings: np.ndarray) -> dict[str, Estimate]:
        """CLIP score and top-5 of one picture a caption with these embeddings, [N, E]."""
        ranked = retrieval(embeddings, self.texts, self.captions, ks=(5,), pool=POOL)
        return {"clip_score": bootstrap(clip_score(embeddings, self.texts)), "top5": bootstrap(ranked.hits[5])}


def measure(
    shelf: Shelf,
    plan: Plan,
    reference: CaptionedReference,
    side: RealSide,
    extractor: Extractor,
    spec: SystemSpec,
    guidance_scale: float,
    *,
    kid_only: bool = False,
    on_scored: OnScored = lambda count: None,
) -> Point:
    """Scores the pictures of one system at one scale; raises PocketfusionError if one is not in the store."""
    what = f"{spec.name} at guidance {guidance_scale:g}"

    def pictures(wanted: Sequence[Wanted]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda numbers: reference.prepare(load(shelf, [wanted[i] for i in numbers], what))

    features, embeddings = _extract(pictures(plan.pictures), len(plan.pictures), extractor, on_scored)
    varied = None
    if plan.again:
        again = [one for row in plan.again for one in row]
        drawn, _ = _extract(pictures(again), len(again), extractor, on_scored)
        varied = diversity(drawn.reshape(len(plan.again), -1, drawn.shape[1]))
    return Point(
        guidance_scale=guidance_scale,
        num_inference_steps=spec.num_inference_steps,
        sampler=spec.sampling,
        precision=spec.precision,
        pictures=len(plan.pictures),
        frechet=None if kid_only else frechet_estimate(features, side.real),
        kid=kid(features, side.real.features),
        diversity=varied,
        **side.scores(embeddings),
    )
