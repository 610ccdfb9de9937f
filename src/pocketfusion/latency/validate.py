"""Architectures to hold a table's predictions against: of every kind of change, and the same for every base alike."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import count, islice
from typing import Any

from pocketfusion.models.architecture import MID, Architecture, BlockName


def validation_architectures(config: Mapping[str, Any], number: int) -> dict[str, Architecture]:
    """The first `number` of an endless, fixed list by name: six hand-made ones, then random ones by seed."""
    return dict(islice(_all(config), number))


def _all(config: Mapping[str, Any]) -> Iterator[tuple[str, Architecture]]:
    base = Architecture.stock(config)
    names = [BlockName.parse(name) for name in base.names()]
    attentions = [name for name in names if name.kind == "attentions"]
    last_up = f"up_blocks.{len(config['block_out_channels']) - 1}"

    yield (
        "no cross-attention at full size",
        _without(base, [n for n in attentions if n.stage in ("down_blocks.0", last_up)]),
    )
    yield "a third of all blocks removed, seed 0", _random(base, share=1 / 3, seed=0)
    yield "no self-attention", _changed(base, attentions, Architecture.without_self_attention)
    # BK-SDM (arXiv 2305.15798) section 3.1: the second ResNet and attention of each stage go, and the mid stage.
    yield "BK-SDM's choice", _without(base, [n for n in names if n.index == 1 or n.stage == MID])
    yield "two thirds of all blocks removed, seed 1", _random(base, share=2 / 3, seed=1)
    deep = [n for n in attentions if n.stage == "up_blocks.1"]
    copied = _changed(base, deep, Architecture.duplicate)
    yield "up_blocks.1's cross-attention copied", copied
    yield "feed-forward halved", _changed(base, attentions, lambda a, name: a.narrow_feed_forward(name, 0.5))
    for seed in count(2):
        yield f"half of all blocks removed, seed {seed}", _random(base, share=0.5, seed=seed)


def _without(base: Architecture, names: list[BlockName]) -> Architecture:
    return _changed(base, names, Architecture.remove)


def _changed(base: Architecture, names: list[BlockName], change: Any) -> Architecture:
    for name in names:
        base = change(base, str(name))
    return base


def _random(base: Architecture, share: float, seed: int) -> Architecture:
    names = base.names()
    for name in random.Random(seed).sample(names, round(share * len(names))):
        base = base.remove(name)
    return base
