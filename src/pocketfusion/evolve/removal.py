"""`pocketfusion remove`: a model folder without the blocks that evolving is compared with."""

from __future__ import annotations

from pathlib import Path

from pocketfusion.artefact import atomic_folder, sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.baselines import bk_sdm, random_removal
from pocketfusion.evolve.budget import budget_in_ms
from pocketfusion.evolve.inputs import open_latency
from pocketfusion.folder import Provenance, check_folder, folder_hash, machine, read_provenance, write_provenance
from pocketfusion.models.architecture import Architecture
from pocketfusion.models.base import copy_with_unet
from pocketfusion.models.elastic_unet import load_elastic
from pocketfusion.models.surgery import with_architecture


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
