"""Which samples and which random numbers belong to a step: a function of the seed, the step and the sample's place.

So a resumed run repeats the uninterrupted one to the sample, and several processes (or accumulation parts) draw for
their own samples, and for those alone, what one process would have drawn. Of pictures of several sizes each batch is
of one bucket, chosen the same way; held-out figures are of a fixed choice of samples, which the processes share.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from pocketfusion.processes import process_state, sum_over_processes


def _stream(seed: int, step: int, place: int, of: int) -> np.random.Generator:
    """One of Philox's streams, which never meet (Salmon et al. 2011): the key names the step, the counter's upper half
    the sample."""
    key, counter = [seed % 2**64, step], [0, 0, place, of]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64)))


@dataclass
class Batch:
    """One process's part of a step's global batch."""

    indices: np.ndarray  #: dataset indices of this part
    start: int  #: where this part begins in the global batch
    total: int  #: samples in the global batch
    step: int  #: from 0
    seed: int = field(repr=False)
    means: torch.Tensor | None = None  #: `Task.means` of the whole step, where this process does it in several parts

    @cached_property
    def _own(self) -> list[np.random.Generator]:
        """A stream of random numbers for each sample of this part."""
        return [_stream(self.seed, self.step, self.start + i, 0) for i in range(len(self.indices))]

    @cached_property
    def _common(self) -> np.random.Generator:
        return _stream(self.seed, self.step, 0, 1)

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, [part, *shape]."""
        drawn = np.empty((len(self._own), *shape), np.float32)
        for row, own in zip(drawn, self._own, strict=True):
            row[...] = own.standard_normal(shape, np.float32)
        return torch.from_numpy(drawn)

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), [part, *shape]."""
        drawn = [own.random(shape, np.float32) for own in self._own]
        return torch.from_numpy(np.array(drawn, np.float32).reshape(len(drawn), *shape))

    def randint(self, high: int) -> torch.Tensor:
        """Uniform integers in [0, high), [part]."""
        return torch.tensor([int(own.integers(high)) for own in self._own])

    def shared(self, count: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), [count], that all parts of the step have in common."""
        return torch.from_numpy(self._common.random(count, np.float32))


class BatchPlan:
    """Shuffled passes over weighted pools of sample indices.

    `pools` maps each pool's index array to its share of every batch (rounded to whole samples); every pool is
    traversed in passes, each a permutation seeded by (seed, pool, pass).
    """

    def __init__(self, pools: list[tuple[np.ndarray, float]], batch_size: int, seed: int):
        pools = [(indices, share) for indices, share in pools if share > 0 and len(indices)]
        total = sum(share for _, share in pools)
        self.counts = [int(batch_size * share / total) for _, share in pools]
        self.counts[0] += batch_size - sum(self.counts)
        self.pools, self.batch_size, self._seed = [indices for indices, _ in pools], batch_size, seed
        self._passes: dict[tuple[int, int], np.ndarray] = {}

    @property
    def seed(self) -> int:
        """Fixed: the passes that are kept depend on it."""
        return self._seed

    def reseeded(self, seed: int) -> BatchPlan:
        """The same pools and shares, drawn by another seed."""
        other = copy(self)
        other._seed, other._passes = seed, {}
        return other

    def _pass(self, pool: int, number: int) -> np.ndarray:
        if (pool, number) not in self._passes:
            for old in [key for key in self._passes if key[0] == pool and key[1] < number - 1]:
                del self._passes[old]
            rng = np.random.default_rng([self.seed, pool, number])
            self._passes[pool, number] = rng.permutation(self.pools[pool])
        return self._passes[pool, number]

    def indices(self, step: int) -> np.ndarray:
        """The global batch of `step` (from 0): dataset indices, [batch_size]."""
        parts = []
        for pool, count in enumerate(self.counts):
            length = len(self.pools[pool])
            for position in range(step * count, (step + 1) * count):
                parts.append(self._pass(pool, position // length)[position % length])
        return np.array(parts)

    def part(self, step: int, part: int, parts: int) -> Batch:
        """The `part`-th of `parts` equal parts of the step's batch, with its samples' random numbers."""
        return self.slice(step, part * (self.batch_size // parts), self.batch_size // parts)

    def slice(self, step: int, start: int, size: int) -> Batch:
        """The `size` samples from `start` on of the step's batch."""
        return Batch(self.indices(step)[start : start + size], start, self.batch_size, step, self.seed)


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


_BLOCK = 32


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """`values`, or `count` of them at even distances if there are more."""
    return values if len(values) <= count else values[np.arange(count) * len(values) // count]


def shared(count: int, width: int, evaluate: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`width` figures of each of `count` held-out samples, [count, width] in fp64, on every process.

    `evaluate(rows)` gives those of a block of samples: [len(rows), width], or [width] where only the block's mean is
    known. A block is one process's work and the same for any number of processes, and so are the figures to the bit.
    All processes must call this together.
    """
    state = process_state()
    figures = torch.zeros(count, width, dtype=torch.float64)
    for rows in torch.arange(count).split(_BLOCK)[state.process_index :: state.num_processes]:
        figures[rows] = evaluate(rows).double().cpu()
    return sum_over_processes(figures)
