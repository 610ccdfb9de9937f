"""Batches of pictures of several sizes: each is of one bucket, chosen by the seed and the step alone."""

from __future__ import annotations

from copy import copy

import numpy as np

from pocketfusion.train.batch import BatchPlan

_CYCLE = 256  #: steps in which every bucket gets its share


def of_one_bucket(indices: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """Those of the bucket that most of `indices` are of; `buckets` [N]: every picture's."""
    counts = np.bincount(buckets[indices])
    return indices[buckets[indices] == counts.argmax()]


def in_buckets(pools: list[tuple[np.ndarray, float]], batch_size: int, seed: int, buckets: np.ndarray) -> BatchPlan:
    """A `BatchPlan` of the pools' samples whose batches are of one bucket; `buckets` [N]: every sample's."""
    kinds = np.unique(np.concatenate([buckets[indices] for indices, share in pools if share > 0]))
    if len(kinds) == 1:
        return BatchPlan(pools, batch_size, seed)
    return BucketedPlan(pools, batch_size, seed, buckets, kinds)


class BucketedPlan(BatchPlan):
    """A plan for each bucket, and whose turn it is: in each cycle of steps every bucket has turns by its samples.

    A bucket's samples are traversed in passes, as a pool's are without buckets; a rare bucket has one turn at least.
    """

    def __init__(
        self,
        pools: list[tuple[np.ndarray, float]],
        batch_size: int,
        seed: int,
        buckets: np.ndarray,
        kinds: np.ndarray,
    ):
        super().__init__(pools, batch_size, seed)
        self.plans, weights = list[BatchPlan](), []
        for kind in kinds:
            own = [(indices[buckets[indices] == kind], share) for indices, share in pools]
            self.plans.append(BatchPlan(own, batch_size, seed))
            weights.append(
                sum(share * len(part) / len(whole) for (part, share), (whole, _) in zip(own, pools, strict=True))
            )
        exact = np.array(weights) / sum(weights) * _CYCLE
        self.turns = np.maximum(1, np.floor(exact).astype(int))
        for _ in range(_CYCLE - self.turns.sum()):
            self.turns[np.argmax(exact - self.turns)] += 1

    def reseeded(self, seed: int) -> BucketedPlan:
        """See `BatchPlan`."""
        other = copy(self)
        other._seed, other._passes, other.plans = seed, {}, [plan.reseeded(seed) for plan in self.plans]
        return other

    def turn(self, step: int) -> tuple[int, int]:
        """Whose turn a step is, and which one of that bucket's (from 0)."""
        cycle, place = divmod(step, self.turns.sum())
        order = np.random.default_rng([self.seed, 2**32, cycle]).permutation(
            np.repeat(np.arange(len(self.turns)), self.turns)
        )
        bucket = int(order[place])
        return bucket, int(cycle * self.turns[bucket] + (order[:place] == bucket).sum())

    def indices(self, step: int) -> np.ndarray:
        """The global batch of `step` (from 0): indices of samples of one bucket, [batch_size]."""
        bucket, number = self.turn(step)
        return self.plans[bucket].indices(number)
