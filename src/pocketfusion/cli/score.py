"""`score`: scores of a model folder's pictures between real ones and shuffled captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.cli.train import SkipBadOpt


@app.command("score")
def score_command(
    folder: Annotated[Path, typer.Argument(help="Model folder to score.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="Folder of captioned pictures.", show_default=False)],
    judge: Annotated[Path, typer.Option("--judge", help="Judge from train-judge.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Result folder to write.", show_default=False)],
    steps: Annotated[int, typer.Option("--steps", help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", help="Guidance scale.")] = 4.0,
    samples: Annotated[int, typer.Option("--samples", help="Pictures of each set.")] = 256,
    seed: Annotated[int, typer.Option("--seed", help="Seed of every picture's noise.")] = 0,
    sets: Annotated[
        str | None, typer.Option("--sets", help="Sets, with commas. Default: training pairs and all test sets.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")] = False,
    skip_bad: SkipBadOpt = False,
) -> None:
    """Score a model folder: CLIP score, retrieval, Fréchet distance, copying, and checkable scenes.

    Each set has a ceiling (real pictures) and a floor (shuffled captions); the scores are our own judge's.
    """
    from pocketfusion.cli.extras import require_compress

    require_compress()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pocketfusion.evaluate.generate import SamplerSettings
    from pocketfusion.evaluate.score.harness import score_folder
    from pocketfusion.evaluate.score.score_report import remarks, tables
    from pocketfusion.terminal import Console, printable_json

    names = [name.strip() for name in sets.split(",") if name.strip()] if sets else None
    sampler = SamplerSettings(num_inference_steps=steps, guidance_scale=guidance)
    folder = model_folder(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        report = score_folder(
            folder,
            data,
            judge,
            out,
            sampler=sampler,
            samples=samples,
            sets=names,
            seed=seed,
            overwrite=overwrite,
            skip_bad=skip_bad,
            progress=advance,
        )
    if as_json:
        typer.echo(printable_json(report.model_dump_json(indent=2)))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for table in tables(report):
        console.print(table)
    for line in remarks(report):
        console.print(line)
    console.print(f"written to {out}: scores.json, scores.md, scores.png, prompts.png, nearest.png")


@app.command("card")
def card_command(
    folder: Annotated[Path, typer.Argument(help="Model, judge or autoencoder folder.", show_default=False)],
    scores: Annotated[Path | None, typer.Option("--scores", help="What `score` wrote for it.")] = None,
    notes: Annotated[Path | None, typer.Option("--notes", help="Markdown to include.")] = None,
) -> None:
    """Write a folder's model card from its provenance and scores."""
    from pocketfusion.cli.extras import require_compress

    require_compress()
    from pocketfusion.evaluate.score.card import write_card

    typer.echo(f"written: {write_card(folder, scores, notes)}")
