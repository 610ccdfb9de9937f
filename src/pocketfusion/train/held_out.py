"""Held-out figures: a fixed choice of the held-out samples, in blocks that the processes of a run share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pocketfusion.processes import process_state, sum_over_processes

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
