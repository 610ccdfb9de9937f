"""`remove`: the removals that an evolved network is compared with."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.evolve import FolderArg, ForceOpt, JsonOpt, LatencyOpt, MsOpt, RatioOpt
from pocketfusion.cli.given import model_folder
from pocketfusion.terminal import Console


class Method(str, Enum):
    """How `remove` chooses blocks."""

    bk_sdm = "bk-sdm"
    random = "random"


@app.command("remove")
def remove_command(
    folder: FolderArg,
    latency: LatencyOpt,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    method: Annotated[Method, typer.Option("--method", help="Order of removal.")] = Method.bk_sdm,
    budget_ms: MsOpt = None,
    budget_ratio: RatioOpt = None,
    seed: Annotated[int, typer.Option("--seed", help="Of a random removal.")] = 0,
    as_json: JsonOpt = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")] = False,
    force: ForceOpt = False,
) -> None:
    """Remove blocks to a latency budget without looking at quality: by BK-SDM's order, or at random.

    What an evolved network is compared with; nothing is trained, `recover` does that.
    """
    from pocketfusion.artefact import check_new
    from pocketfusion.cli.extras import require_compress

    check_new(out, overwrite)
    require_compress()
    from pocketfusion.evolve.removal import remove_folder

    folder = model_folder(folder)
    made = remove_folder(
        folder,
        latency,
        out,
        method=method.value,
        budget_ms=budget_ms,
        budget_ratio=budget_ratio,
        seed=seed,
        force=force,
        overwrite=overwrite,
    )
    results = made.results
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{out}: {results['blocks']} blocks, {results['latency_ms']:.4g} ms a guided step, "
        f"{results['latency_ratio']:.2f} of the base"
    )
    console.print(f"removed: {', '.join(results['removed'])}")
