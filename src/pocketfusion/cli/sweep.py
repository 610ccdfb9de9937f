"""`sweep`: Fréchet distance against CLIP score over guidance, several model folders in one harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app


@app.command("sweep")
def sweep_command(
    folders: Annotated[list[Path], typer.Argument(help="Model folders to compare.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="Folder of captioned pictures.", show_default=False)],
    judge: Annotated[Path, typer.Option("--judge", help="Judge from train-judge.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Result folder to write.", show_default=False)],
    guidance: Annotated[str, typer.Option("--guidance", help="Guidance scales, with commas.")] = "1,2,3,4.5,6,8",
    samples: Annotated[int, typer.Option("--samples", help="Pictures of each set.")] = 768,
    sets: Annotated[str, typer.Option("--sets", help="Sets, with commas; several are pooled.")] = "test_combo",
    steps: Annotated[int, typer.Option("--steps", help="Sampling steps.")] = 25,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every picture's noise.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")] = False,
) -> None:
    """Compare model folders by their curves of Fréchet distance and CLIP score over guidance.

    Same captions, noise and seeds for all. Points are kept in OUT.run: run again to go on after a stop.
    """
    from pocketfusion.cli.extras import require_compress

    require_compress()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pocketfusion.evaluate.generate import SamplerSettings
    from pocketfusion.evaluate.sweep import parse_guidance
    from pocketfusion.evaluate.sweep_run import remarks, sweep_folders, table

    scales = parse_guidance(guidance)
    names = [name.strip() for name in sets.split(",") if name.strip()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("opening", total=None)
        result = sweep_folders(
            folders,
            data,
            judge,
            out,
            guidance=scales,
            sampler=SamplerSettings(num_inference_steps=steps),
            samples=samples,
            sets=names,
            seed=seed,
            overwrite=overwrite,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table(result))
    for line in remarks(result):
        console.print(line)
    console.print(f"written to {out}: curve.json, curve.md, curve.png")
