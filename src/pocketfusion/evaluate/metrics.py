"""The measures, as pure functions on feature and embedding arrays, with how sure they are.

Of pictures with their captions (CLIP score, retrieval), of a set against the real one (Fréchet distance, KID), and of
one prompt's pictures among themselves (diversity).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
POOL = 256  #: captions that a picture finds its own among


KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  #: as torchmetrics has them, the size at most half of the pictures


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
    pool: int = POOL,
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


class Spread(NamedTuple):
    """A mean over random subsets and their standard deviation."""

    value: float
    std: float


class RealFeatures:
    """The real pictures' features [M, F], with what every Fréchet distance to them needs worked out once."""

    def __init__(self, features: np.ndarray):
        self.features = features
        self._root: tuple[np.ndarray, np.ndarray, float] | None = None

    def gaussian(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Mean [F], Σ^½ [F, F] and tr Σ in float64."""
        if self._root is None:
            real = self.features.astype(np.float64)
            values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(real, rowvar=False)))
            root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
            self._root = real.mean(axis=0), root, float(values.sum())
        return self._root


def frechet_resamples(dimensions: int) -> int:
    """How many resamples an interval gets: a root of 2048 dimensions takes seconds."""
    return 100 if dimensions <= 512 else 20


def frechet_estimate(features: np.ndarray, real: RealFeatures, seed: int = 0) -> Estimate:
    """`frechet_distance` of drawn pictures [N, F] to the real ones, with a 95 % bootstrap interval.

    Only the drawn pictures are resampled. A resample repeats pictures, so its distance is too large, as that of a
    smaller set is; the interval is therefore that of the resamples moved to have the distance itself as its mean. It
    covers the choice of pictures and noise, not the distance's own bias, which both of two compared sets of one size
    have. With few pictures a dimension it is too wide rather than too narrow.

    tr (Σr^½ Σ Σr^½)^½ is taken in the features' image under Σr^½: one eigvalsh a resample.
    """
    mean, root, trace = real.gaussian()
    x = features.astype(np.float64)
    offset = x.mean(axis=0) - mean
    x -= x.mean(axis=0)
    squares, moved, count = (x**2).sum(axis=1), x @ root, len(x)

    def distance(times: np.ndarray) -> float:  # how often each picture counts, [N]
        kept = np.flatnonzero(times)
        weighted = moved[kept] * np.sqrt(times[kept])[:, None]
        shift, centre = times @ x / count, times @ moved / count
        covariance = (weighted.T @ weighted - count * np.outer(centre, centre)) / (count - 1)
        root_trace = np.sqrt(np.linalg.eigvalsh(covariance).clip(0)).sum()
        variance = (times @ squares - count * shift @ shift) / (count - 1)
        return float((shift + offset) @ (shift + offset) + variance + trace - 2 * root_trace)

    rng = np.random.default_rng(seed)
    value = max(0.0, distance(np.ones(count)))
    resampled = [
        distance(np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64))
        for _ in range(frechet_resamples(x.shape[1]))
    ]
    low, high = np.percentile(resampled, (2.5, 97.5)) - np.mean(resampled)
    return Estimate(value, max(0.0, value + float(low)), value + float(high))


def kid(features: np.ndarray, real: np.ndarray, seed: int = 0) -> Spread:
    """Kernel distance of Bińkowski et al. (arXiv 1801.01401): unbiased MMD² of the kernel (x·y / F + 1)³ over random
    subsets of [N, F] and [M, F]. Unlike the Fréchet distance it does not depend on how many pictures there are.
    """
    size = kid_subset_size(min(len(features), len(real)))
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(KID_SUBSETS):
        x = features[rng.permutation(len(features))[:size]].astype(np.float32)
        y = real[rng.permutation(len(real))[:size]].astype(np.float32)
        within = (_kernel(x, x, True) + _kernel(y, y, True)) / (size * (size - 1))
        values.append(within - 2 * _kernel(x, y, False) / size**2)
    return Spread(float(np.mean(values)), float(np.std(values)))


def kid_subset_size(count: int) -> int:
    """Half of the pictures at most: subsets that are all of them would have no spread."""
    return min(KID_SUBSET_SIZE, count // 2)


def _kernel(x: np.ndarray, y: np.ndarray, without_diagonal: bool) -> float:
    """Sum of the kernel over all pairs of rows, summed in float64."""
    values = x @ y.T / np.float32(x.shape[1]) + np.float32(1)
    values = values * values * values
    if without_diagonal:
        np.fill_diagonal(values, 0)
    return float(values.sum(dtype=np.float64))


def diversity(features: np.ndarray) -> Estimate:
    """Mean Euclidean distance between the features of one prompt's pictures, [prompts, pictures, F].

    The interval is over prompts. A model that draws one picture whatever the noise has 0.
    """
    count = features.shape[1]
    first, second = np.triu_indices(count, 1)
    x = features.astype(np.float64)
    return bootstrap(np.linalg.norm(x[:, first] - x[:, second], axis=-1).mean(axis=1))
