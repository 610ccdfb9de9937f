"""What evolving is compared with: removal by BK-SDM's hand-picked order, and at random, to the same latency."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.budget import check_reachable
from pocketfusion.evolve.values import Latency
from pocketfusion.models.architecture import MID, Architecture
from pocketfusion.models.skips import check_architecture

METHODS = ("bk-sdm", "random")
_PATIENT = 12  #: blocks of a step whose subsets are all tried


def bk_sdm(config: Mapping[str, Any], latency: Latency, budget_ms: float) -> tuple[Architecture, list[str]]:
    """The stock network without what BK-SDM (arXiv 2305.15798, section 3.1) removes, as far as the budget asks for.

    In its order: the second ResNet-attention pair of each down stage with the middle pair of its up stage
    (BK-SDM-Base), the mid block (Small), the innermost stages (Tiny). Beyond Tiny, which keeps more than half of the
    latency, the paper has nothing: the innermost stage that is left loses its blocks, then the next. Of the last step
    only those blocks go whose removal ends nearest below the budget. Also returns the names of the steps taken.
    Raises PocketfusionError if the budget cannot be reached.
    """
    stock = Architecture.stock(config)
    check_reachable(budget_ms, stock, ("remove",), config, latency)
    now, taken = stock, []
    for name, after in _steps(config, stock):
        gone = [block for block in now.names() if block not in after(now).names()]
        if not gone:
            continue
        taken.append(name)
        if latency(after(now)) > budget_ms:
            now = after(now)
            continue
        candidates = [after(now), *_partial(now, gone)]
        fitting = [(latency(candidate), -i) for i, candidate in enumerate(candidates)]
        best = max(pair for pair in fitting if pair[0] <= budget_ms)
        return candidates[-best[1]], taken
    raise PocketfusionError(
        f"BK-SDM's order reaches {latency(now):.4g} ms, not the budget of {budget_ms:.4g} ms: raise the budget"
    )


def _partial(architecture: Architecture, blocks: list[str]) -> Iterator[Architecture]:
    """The architecture without each set of `blocks` (of many: without the first, the first two ...)."""
    few = len(blocks) <= _PATIENT
    for count in range(1, len(blocks) + 1):
        for chosen in combinations(blocks, count) if few else [tuple(blocks[:count])]:
            smaller = architecture
            for block in chosen:
                smaller = smaller.remove(block)
            yield smaller


def _steps(config: Mapping[str, Any], stock: Architecture) -> Iterator[tuple[str, Any]]:
    """(name, change) of each step; a change that the base's shapes do not allow is left out."""
    last, layers = len(config["block_out_channels"]) - 1, config["layers_per_block"]

    def pair(stage: int):
        def change(now: Architecture) -> Architecture:
            return now.drop_layer(f"down_blocks.{stage}", layers - 1).drop_layer(
                f"up_blocks.{last - stage}", (layers + 1) // 2
            )

        return change

    def without_mid(now: Architecture) -> Architecture:
        return now.drop_stage(MID)

    def without_innermost(now: Architecture) -> Architecture:
        return now.drop_level(last)

    def without_blocks(stages: tuple[str, ...]):
        def change(now: Architecture) -> Architecture:
            for name in now.names():
                if name.startswith(tuple(f"{stage}." for stage in stages)):
                    now = now.remove(name)
            return now

        return change

    steps = [(f"pair of stage {stage}", pair(stage)) for stage in range(last + 1)] if layers > 1 else []
    steps += [("mid block", without_mid), ("innermost stage", without_innermost)]
    now = stock
    for name, change in steps:
        try:
            check_architecture(change(now), config)
        except PocketfusionError:
            continue
        now = change(now)
        yield name, change
    for stage in range(last, -1, -1):
        yield f"blocks of stage {stage}", without_blocks((f"down_blocks.{stage}", f"up_blocks.{last - stage}"))


def random_removal(
    config: Mapping[str, Any], latency: Latency, budget_ms: float, seed: int
) -> tuple[Architecture, list[str]]:
    """The stock network without uniformly drawn blocks; also returns their names.

    Blocks go in a random order until the budget is met; then those that still fit come back, last removed first, so
    that its latency is near the budget. Raises PocketfusionError if the budget cannot be reached.
    """
    stock = Architecture.stock(config)
    check_reachable(budget_ms, stock, ("remove",), config, latency)
    order = [str(name) for name in np.random.default_rng(seed).permutation(stock.names())]

    def without(names: list[str]) -> Architecture:
        smaller = stock
        for name in names:
            smaller = smaller.remove(name)
        return smaller

    removed: list[str] = []
    for name in order:
        if latency(without(removed)) <= budget_ms:
            break
        removed.append(name)
    for name in reversed(removed):
        rest = [other for other in removed if other != name]
        if latency(without(rest)) <= budget_ms:
            removed = rest
    return without(removed), removed
