"""The pruning stage: a model folder in, one whose UNet has fewer units out; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from pocketfusion.mobile.cost import unet_cost
from pocketfusion.models.base import copy_with_unet
from pocketfusion.models.elastic_unet import ElasticUNet, load_elastic
from pocketfusion.models.surgery import without_units
from pocketfusion.prune.harm import noise, predictions, real_calls, unit_harm
from pocketfusion.prune.plan import Place, Prunable, least_harm, uniform

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
