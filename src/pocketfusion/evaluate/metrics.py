"""The measures, as pure functions on feature and embedding arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Estimate(NamedTuple):
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(values: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of per-picture `values` [N] with the percentile bootstrap's 95 % interval (Efron 1979), over pictures.

    It says how far the mean would move with other pictures, not with another model or another seed.
    """
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Estimate(float(values.mean()), float(low), float(high))


def clip_score(image_embeddings: np.ndarray, text_embeddings: np.ndarray) -> np.ndarray:
    """100 × cosine of each picture with its own caption, [N] (Hessel et al. 2021, without their factor 2.5 and clip).

    Both arrays are [N, E] of unit vectors; the set's score is the mean.
    """
    return 100.0 * np.einsum("ne,ne->n", image_embeddings, text_embeddings, dtype=np.float64)


@dataclass(frozen=True)
class Retrieval:
    """Who found their own caption: `hits[k]` [M] is each picture's credit for being among the first k."""

    hits: dict[int, np.ndarray]
    chance: dict[int, float]  #: expected hits of a judge that guesses
    pool: int  #: captions that each picture was compared with, own included (before equal ones are joined)


def retrieval(
    image_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    captions: Sequence[str],
    ks: Sequence[int] = (1, 5),
    pool: int = 256,
) -> Retrieval:
    """Ranks each picture's own caption among the distinct captions of its pool.

    Pools are runs of `pool` pictures in the given order; fewer than `pool` left over at the end are not ranked, so
    that numbers of sets of different sizes compare (a smaller set is one pool). Equal captions count as one. Captions
    that tie with the picture's own share the places: the credit is the chance of being among the first k if
    ties are broken at random, so a judge that says the same of everything scores exactly chance.
    """
    pool = min(pool, len(captions))
    starts = range(0, len(captions) - pool + 1, pool)
    hits: dict[int, list[np.ndarray]] = {k: [] for k in ks}
    sizes = []
    for start in starts:
        part = list(captions[start : start + pool])
        first = {caption: i for i, caption in reversed(list(enumerate(part)))}
        distinct = list(first)
        own = np.array([distinct.index(caption) for caption in part])
        texts = text_embeddings[start + np.array([first[caption] for caption in distinct])]
        similarity = image_embeddings[start : start + pool] @ texts.T
        mine = similarity[np.arange(pool), own][:, None]
        above = (similarity > mine).sum(axis=1)
        tied = (similarity == mine).sum(axis=1)
        for k in ks:
            hits[k].append(np.clip((k - above) / tied, 0.0, 1.0))
        sizes.append(len(distinct))
    chance = {k: float(np.mean([min(1.0, k / size) for size in sizes])) for k in ks}
    return Retrieval({k: np.concatenate(parts) for k, parts in hits.items()}, chance, pool)


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets [N, F] and [M, F] (Heusel et al. 2017).

    |μa − μb|² + tr(Σa + Σb − 2 (Σa Σb)^½) in float64; the trace of the root is taken from the eigenvalues of the
    symmetric Σa^½ Σb Σa^½, which needs no general matrix root. It shrinks as N grows: compare at equal N only.
    Raises ValueError if a set has fewer than two rows.
    """
    if min(len(features_a), len(features_b)) < 2:
        raise ValueError("the Fréchet distance needs at least two pictures on each side")
    a, b = features_a.astype(np.float64), features_b.astype(np.float64)
    cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    root_trace = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(max(0.0, difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace))


def too_few_for_frechet(count: int, features: int) -> str | None:
    """Why a set of `count` pictures gets no Fréchet distance over `features` dimensions, or None if it gets one.

    Below 2 × F pictures the covariance is so uncertain that the distance mostly measures the sample size.
    """
    if count >= 2 * features:
        return None
    return f"{count} pictures are too few for {features} features: at least {2 * features} are needed"
