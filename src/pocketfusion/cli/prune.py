"""`prune`: a model folder whose UNet has fewer channels, heads and feed-forward units."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.cli.train import SkipBadOpt
from pocketfusion.terminal import Console


class Rule(str, Enum):
    """How `prune` chooses units."""

    uniform = "uniform"
    sensitivity = "sensitivity"


@app.command("prune")
def prune_command(
    folder: Annotated[Path, typer.Argument(help="Model folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    rule: Annotated[Rule, typer.Option("--rule", help="Which units go.")] = Rule.uniform,
    ratio: Annotated[float, typer.Option("--ratio", help="Share of the UNet's parameters to remove.")] = 0.11,
    data: Annotated[Path | None, typer.Option("--data", help="Captioned pictures to measure on.")] = None,
    samples: Annotated[int, typer.Option("--samples", help="Pictures to measure on.")] = 128,
    seed: Annotated[int, typer.Option("--seed", help="Of the noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")] = False,
    skip_bad: SkipBadOpt = False,
) -> None:
    """Prune ResNet channels, attention heads and feed-forward units of the UNet; `recover` trains it afterwards.

    `uniform` takes the same share of the largest layers (Squeezing); `sensitivity` what harms the output least.
    """
    from pocketfusion.artefact import check_new
    from pocketfusion.cli.extras import quiet_libraries, require_compress

    check_new(out, overwrite)
    require_compress()
    quiet_libraries()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pocketfusion.prune.run import prune_folder

    folder = model_folder(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring" if rule == Rule.sensitivity else "pruning", total=None)
        made = prune_folder(
            folder,
            out,
            rule=rule.value,
            ratio=ratio,
            data=data,
            samples=samples,
            seed=seed,
            overwrite=overwrite,
            skip_bad=skip_bad,
            done=lambda count, total: bar.update(task, completed=count, total=total),
        )
    results = made.results
    if as_json:
        typer.echo(json.dumps(results, indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for part, lines in results["units"].items():
        console.print(f"{part.replace('_', ' ')}: {', '.join(lines)}")
    saved = 1 - results["multiply_adds"] / results["base_multiply_adds"]
    console.print(
        f"{out}: {results['parameters'] / 1e6:.2f} M parameters of {results['base_parameters'] / 1e6:.2f} M "
        f"({results['removed']:.1%} less), multiply-adds {saved:.1%} less"
    )
    if noise := results.get("noise"):
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in noise.items())
        console.print(f"noise over signal on held-out latents: {shown}")
    if made.data:
        console.print(f"measured on {made.data['name']}")
