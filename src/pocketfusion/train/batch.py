"""Which samples and which random numbers belong to a step: a function of the seed and the step alone.

So a resumed run repeats the uninterrupted one to the sample, and several processes (or accumulation parts) draw what
one process would have drawn and take their slice of it.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

import numpy as np
import torch

_PRIME = 1_000_003


@dataclass
class Batch:
    """One process's part of a step's global batch."""

    indices: np.ndarray  #: dataset indices of this part
    start: int  #: where this part begins in the global batch
    total: int  #: samples in the global batch
    step: int  #: from 0
    generator: torch.Generator = field(repr=False)
    means: torch.Tensor | None = None  #: `Task.means` of the whole step, where this process does it in several parts

    def _part(self, values: torch.Tensor) -> torch.Tensor:
        return values[self.start : self.start + len(self.indices)]

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers, [part, *shape]."""
        return self._part(torch.randn(self.total, *shape, generator=self.generator))

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), [part, *shape]."""
        return self._part(torch.rand(self.total, *shape, generator=self.generator))

    def shared(self, count: int) -> torch.Tensor:
        """Uniform numbers in [0, 1), [count], that all parts of the step have in common."""
        return torch.rand(count, generator=self.generator)

    def randint(self, high: int) -> torch.Tensor:
        """Uniform integers in [0, high), [part]."""
        return self._part(torch.randint(high, (self.total,), generator=self.generator))


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
        """The `part`-th of `parts` equal parts of the step's batch, with the step's random numbers."""
        size = self.batch_size // parts
        start = part * size
        generator = torch.Generator().manual_seed((self.seed * _PRIME + step) % 2**63)
        return Batch(self.indices(step)[start : start + size], start, self.batch_size, step, generator)
