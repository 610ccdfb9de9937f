"""Which units go: Squeezing's uniform rule, and the least harm for each parameter saved.

*Squeezing Large-Scale Diffusion Models for Mobile* (arXiv 2307.01193) and its authors' page: structured, "without a
sensitivity metric", on the largest layers of the UNet, about 11 % of its parameters. Which layers count as large, what
share each loses and which units go is not published; `uniform` says what is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.units import Units, block_units

#: Largest share of a layer's units that `uniform` takes while there are other layers to take from.
UNIFORM_SHARE = 0.25
Place = tuple[str, Units]  #: a block's name and one of its parts


@dataclass(frozen=True)
class Prunable:
    """The parts of a UNet that have units to give, and the parameters of one unit of each."""

    total: int  #: parameters of the whole UNet
    sizes: dict[Place, int]

    @classmethod
    def of(cls, unet: ElasticUNet) -> Prunable:
        """Of `unet`, whose weights may be on `meta`."""
        sizes = {}
        for name in unet.architecture.names():
            block = unet.block(name)
            weights = block.state_dict()
            for units in block_units(block):
                if units.most:
                    sizes[name, units] = units.parameters(weights)
        return cls(sum(p.numel() for p in unet.parameters()), sizes)

    @property
    def most(self) -> float:
        """The largest share of the parameters that can go."""
        return sum(units.most * size for (_, units), size in self.sizes.items()) / self.total

    def wanted(self, ratio: float) -> float:
        """Parameters that `ratio` is; raises PocketfusionError if they cannot go."""
        if not 0 < ratio < 1:
            raise PocketfusionError(
                f"--ratio {ratio:g} is not between 0 and 1: give the share of the UNet's parameters to remove"
            )
        if ratio > self.most:
            raise PocketfusionError(
                f"--ratio {ratio:g} is beyond what pruning can remove, which leaves each part at least one unit: "
                f"choose at most {math.floor(1000 * self.most) / 1000:g}"
            )
        return ratio * self.total

    def removed(self, counts: Mapping[Place, int]) -> int:
        """Parameters of so many units of each place."""
        return sum(self.sizes[place] * count for place, count in counts.items())


def uniform_counts(prunable: Prunable, ratio: float) -> dict[Place, int]:
    """How many units of each part go: the same share of the largest ones, as few as suffice at `UNIFORM_SHARE`.

    A part is a feed-forward, an attention or the inside of a ResNet, its size all parameters that its units have.
    Parts of one size are taken together. Where whole units do not add up to the ratio, the largest parts give more.
    Raises PocketfusionError as `Prunable.wanted` does.
    """
    wanted = prunable.wanted(ratio)
    order = sorted(prunable.sizes, key=lambda place: -place[1].count * prunable.sizes[place])
    size = {place: place[1].count * prunable.sizes[place] for place in order}
    chosen: list[Place] = []
    for place in order:
        if UNIFORM_SHARE * sum(size[one] for one in chosen) >= wanted and size[place] < size[chosen[-1]]:
            break
        chosen.append(place)
    share = wanted / sum(size[place] for place in chosen)
    counts = {}
    for place in chosen:
        units = place[1]
        counts[place] = min(units.most, math.floor(share * units.count / units.step + 1e-9) * units.step)
    waiting = chosen
    while prunable.removed(counts) < wanted:
        waiting = [place for place in waiting if counts[place] < place[1].most]
        if not waiting:  # these have no more to give: on to the next ones
            waiting = [place for place in order if counts.get(place, 0) < place[1].most]
        for place in waiting:
            if prunable.removed(counts) >= wanted:
                break
            counts[place] = counts.get(place, 0) + place[1].step
    return {place: count for place, count in counts.items() if count}


def uniform(unet: ElasticUNet, ratio: float) -> dict[Place, torch.Tensor]:
    """Units kept by the uniform rule: indices, ascending, of each part that loses some; the weakest by norm go."""
    kept = {}
    for (name, units), count in uniform_counts(Prunable.of(unet), ratio).items():
        kept[name, units] = units.strongest(unet.block(name).state_dict(), units.count - count)
    return kept


def least_harm(unet: ElasticUNet, ratio: float, harm: Mapping[Place, torch.Tensor]) -> dict[Place, torch.Tensor]:
    """Units kept when those go that do least harm for each parameter, until `ratio` of the parameters is gone.

    `harm`: [count] of each part's units, taken to add up. A part's units go in steps, the least harmful first.
    Raises PocketfusionError as `Prunable.wanted` does.
    """
    prunable = Prunable.of(unet)
    wanted, removed = prunable.wanted(ratio), 0
    steps: list[tuple[float, int, Place]] = []
    order = {place: harm[place].argsort() for place in prunable.sizes}
    for place, size in prunable.sizes.items():
        units = place[1]
        ascending = harm[place][order[place]][: units.most].reshape(-1, units.step).sum(1) / (units.step * size)
        steps += [(float(value), number, place) for number, value in enumerate(ascending)]
    counts: dict[Place, int] = {}
    # within a part the steps rise, so a part's earlier steps come first, ties by their number
    for _, _, place in sorted(steps, key=lambda step: step[:2]):
        if removed >= wanted:
            break
        counts[place] = counts.get(place, 0) + place[1].step
        removed += place[1].step * prunable.sizes[place]
    return {place: order[place][count:].sort().values for place, count in counts.items()}
