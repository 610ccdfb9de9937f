"""The pruning stage: a model folder in, one whose UNet has fewer units out; nothing is trained.

Which units go: Squeezing's uniform rule, or the least harm for each parameter saved. *Squeezing Large-Scale Diffusion
Models for Mobile* (arXiv 2307.01193) and its authors' page: structured, "without a sensitivity metric", on the largest
layers of the UNet, about 11 % of its parameters. Which layers count as large, what share each loses and which units go
is not published; `uniform` says what is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from pocketfusion.artefact import atomic_folder
from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import ModelFolder
from pocketfusion.folder import (
    Provenance,
    check_finite,
    check_folder,
    folder_hash,
    machine,
    read_provenance,
    write_provenance,
)
from pocketfusion.mobile.pipeline_specs import unet_cost
from pocketfusion.models.elastic.transfer import without_units
from pocketfusion.models.elastic.units import block_units
from pocketfusion.models.elastic_unet import ElasticUNet, load_elastic
from pocketfusion.models.writing import copy_with_unet
from pocketfusion.prune.harm import Place, noise, predictions, real_calls, unit_harm

#: Largest share of a layer's units that `uniform` takes while there are other layers to take from.
UNIFORM_SHARE = 0.25


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


Rule = Literal["uniform", "sensitivity"]
TRAINING, HELD_OUT = "train", "val_combo"


def prune_folder(
    folder: Path,
    out: Path,
    *,
    rule: Rule,
    ratio: float,
    data: Path | None = None,
    samples: int = 128,
    seed: int = 0,
    overwrite: bool = False,
    skip_bad: bool = False,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> Provenance:
    """Writes `folder` without `ratio` of its UNet's parameters, chosen by `rule`.

    `data`: captioned pictures; `samples` training pictures are what `sensitivity` measures on, as many held-out ones
    (`val_combo`) what the result's output is compared on. Without it only `uniform` works, and nothing is compared.
    Raises PocketfusionError if the ratio cannot be removed, `folder` is unsound or not SD-family, or data is missing.
    """
    check_folder(folder)
    if rule == "sensitivity" and data is None:
        raise PocketfusionError("--rule sensitivity measures on pictures: give --data, or choose --rule uniform")
    if samples < 2:
        raise PocketfusionError(f"--samples {samples} is too few to measure on: give at least 2, better 128")
    unet = load_elastic(folder).eval()
    check_finite(unet, str(folder / "unet"))
    prunable = Prunable.of(unet)
    prunable.wanted(ratio)
    results: dict[str, Any] = {}
    before, parents = read_provenance(folder), {"base": folder_hash(folder)}
    settings = {"rule": rule, "ratio": ratio}
    used: dict[str, Any] = {}
    if data is None:
        kept = uniform(unet, ratio)
        pruned = without_units(unet, kept)
        tokens = _tokens(folder)
    else:
        system = ModelFolder(folder)
        unet.to(system.device)
        images = open_dataset(data, system.image_size, skip_bad=skip_bad)
        used, tokens = {"name": images.name, "fingerprint": images.fingerprint}, system.text.max_length
        held_out = real_calls(system, images, HELD_OUT, samples, seed)
        settings["samples"] = samples
        estimate = None
        if rule == "uniform":
            kept = uniform(unet, ratio)
        else:
            training = real_calls(system, images, TRAINING, samples, seed)
            harm = unit_harm(unet, prunable.sizes, training, seed=seed, done=done)
            kept = least_harm(unet, ratio, harm)
            estimate = sum(float(harm[place].sum() - harm[place][index].sum()) for place, index in kept.items())
        pruned = without_units(unet, kept)
        results["noise"] = noise(predictions(pruned, held_out), predictions(unet, held_out))
        if estimate is not None:
            results["estimated_noise"] = estimate
    results |= _figures(unet, pruned, kept, tokens)
    provenance = Provenance(
        stage="prune",
        settings=settings,
        parents=parents,
        data=used,
        seed=seed,
        samples_seen=before.samples_seen if before else 0,
        machine=machine(),
        results=results,
    )
    with atomic_folder(out, overwrite=overwrite) as partial:
        copy_with_unet(folder, partial, pruned.cpu())
        write_provenance(partial, provenance)
    return provenance


def _tokens(folder: Path) -> int:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True).model_max_length


def _figures(
    unet: ElasticUNet, pruned: ElasticUNet, kept: Mapping[Place, torch.Tensor], tokens: int
) -> dict[str, Any]:
    """Parameters and multiply-adds before and after, and what each part lost."""
    costs = [unet_cost(one.config, one.architecture, tokens) for one in (unet, pruned)]
    gone: dict[str, list[str]] = {}
    for (name, units), index in kept.items():
        gone.setdefault(units.part, []).append(f"{name}: {units.count - len(index)} of {units.count}")
    return {
        "parameters": costs[1].parameters,
        "base_parameters": costs[0].parameters,
        "removed": 1 - costs[1].parameters / costs[0].parameters,
        "multiply_adds": costs[1].multiply_adds,
        "base_multiply_adds": costs[0].multiply_adds,
        "units": {part: sorted(lines) for part, lines in gone.items()},
    }
