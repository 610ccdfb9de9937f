"""`pocketfusion remove`: what evolving is compared with, removal by BK-SDM's hand-picked order or at random.

Both go down to the same latency; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.artefact import atomic_folder, sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.search import open_latency
from pocketfusion.evolve.values import Latency, budget_in_ms, check_reachable
from pocketfusion.folder import Provenance, check_folder, folder_hash, machine, read_provenance, write_provenance
from pocketfusion.models.elastic.architecture import MID, Architecture
from pocketfusion.models.elastic.skips import check_architecture
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.models.writing import copy_with_unet

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


def remove_folder(
    folder: Path,
    latency: Path,
    out: Path,
    *,
    method: str,
    budget_ms: float | None = None,
    budget_ratio: float | None = None,
    seed: int = 0,
    force: bool = False,
    overwrite: bool = False,
) -> Provenance:
    """Writes `folder` with blocks removed by BK-SDM's order or at random until the budget is met; nothing is trained.

    Raises PocketfusionError as `bk_sdm` and `random_removal` do, or if `folder` is evolved already.
    """
    check_folder(folder)
    unet = load_elastic(folder)
    if unet.architecture != Architecture.stock(unet.config):
        raise PocketfusionError(f"{folder} is evolved already: give the base that it came from")
    predict = open_latency(latency, unet, force)
    budget = budget_in_ms(budget_ms, budget_ratio, unet.config, predict)
    if method == "bk-sdm":
        architecture, steps = bk_sdm(unet.config, predict, budget)
    else:
        architecture, steps = random_removal(unet.config, predict, budget, seed)
    before, made, stock = read_provenance(folder), predict(architecture), predict(unet.architecture)
    provenance = Provenance(
        stage="remove",
        settings={"method": method, "budget_ms": budget},
        parents={"base": folder_hash(folder), "latency": sha256_file(latency)},
        seed=seed,
        samples_seen=before.samples_seen if before else 0,
        machine=machine(),
        results={
            "latency_ms": made,
            "base_latency_ms": stock,
            "latency_ratio": made / stock,
            "removed": steps,
            "blocks": len(architecture.names()),
        },
    )
    with atomic_folder(out, overwrite=overwrite) as partial_folder:
        copy_with_unet(folder, partial_folder, with_architecture(unet, architecture))
        write_provenance(partial_folder, provenance)
    return provenance
