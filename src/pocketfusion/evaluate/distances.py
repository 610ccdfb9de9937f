"""Distances of a set of pictures to the real ones, with how sure they are, and how much a prompt's pictures differ."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pocketfusion.evaluate.metrics import Estimate, bootstrap

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  #: as torchmetrics has them, the size at most half of the pictures


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
    """`metrics.frechet_distance` of drawn pictures [N, F] to the real ones, with a 95 % bootstrap interval.

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
