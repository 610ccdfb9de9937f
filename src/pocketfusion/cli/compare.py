"""`compare`: what bundles draw beside what stock diffusers draws of their folder, as a page to show."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from pocketfusion.evaluate.comparison.compare import Comparison
    from pocketfusion.terminal import Console

PathOpt = Path | None


@app.command("compare")
def compare_command(
    folder: Annotated[Path, typer.Argument(help="Model folder or checkpoint file: the original.", show_default=False)],
    bundles: Annotated[list[Path], typer.Argument(help="Bundles exported from it.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="OUT.html", help="Page to write, with OUT.json.", show_default=False)
    ],
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="A prompt a line, or JSON lines; - reads them from the input."),
    ] = None,
    count: Annotated[int | None, typer.Option("--count", help="The first so many. Default: all.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Prompt i, from 0, is drawn from the noise of seed + i.")] = 0,
    steps: Annotated[int | None, typer.Option("--steps", help="Of both sides. Default: the bundle's.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="The same of the guidance scale.")] = None,
    sampler: Annotated[
        str | None, typer.Option("--sampler", metavar="NAME", help="The same of the sampler: one that info lists.")
    ] = None,
    clip: Annotated[PathOpt, typer.Option("--clip", help="CLIP folder or open_clip weights, to score.")] = None,
    clip_model: Annotated[str, typer.Option("--clip-model", help="open_clip's name of it.")] = "ViT-g-14",
    judge: Annotated[PathOpt, typer.Option("--judge", help="Judge from train-judge, to score.")] = None,
    min_psnr: Annotated[
        float | None, typer.Option("--min-psnr", metavar="DB", help="Exit with code 1 if a pair is below.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads. Default: all cores.")] = None,
) -> None:
    """Show what bundles draw beside stock diffusers: same prompts, same noise, worst pairs first.

    Writes a self-contained page and a JSON file. Settings that are not given are each bundle's own.
    """
    from pocketfusion.artefact import atomic_file, check_files
    from pocketfusion.cli.extras import require_compress

    require_compress()
    if out.suffix.lower() not in (".html", ".htm"):
        raise PocketfusionError(f"the output is {out}: give it a name that ends in .html")
    check_files(out, beside := out.with_suffix(".json"))
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pocketfusion.evaluate.comparison.compare import Asked, compare
    from pocketfusion.evaluate.comparison.compare_page import page
    from pocketfusion.evaluate.prompts import read_prompts
    from pocketfusion.terminal import Console

    folder = model_folder(folder)
    asked = Asked(read_prompts(prompts, count), seed, sampler, steps, guidance)
    scorers = _scorers(clip, clip_model, judge)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("opening", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        outcome = compare(
            folder, bundles, asked, scorers=scorers, min_psnr_db=min_psnr, threads=threads, progress=advance
        )
    result = outcome.comparison
    with atomic_file(out) as html, atomic_file(beside) as values:
        html.write_text(page(outcome, shlex.join(["pocketfusion", *sys.argv[1:]])), encoding="utf-8")
        values.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _print(console, result)
    console.print(f"written: {out}, {beside}")
    if not result.passed:
        raise typer.Exit(1)


def _scorers(clip: Path | None, clip_model: str, judge: Path | None) -> dict[str, tuple[Any, dict[str, Any]]]:
    from pocketfusion.evaluate.extractors import JudgeExtractor, open_clip_model

    scorers: dict[str, tuple[Any, dict[str, Any]]] = {}
    if clip is not None:
        model, described = open_clip_model(clip, clip_model)
        scorers[f"CLIP score by {described['name']}"] = model, described
    if judge is not None:
        own = JudgeExtractor(judge)
        scorers["CLIP score by our judge"] = own, own.identity()
    return scorers


def _print(console: Console, result: Comparison) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("bundle", overflow="fold")
    for name in ("MB", "dB", "5 %", "worst", "SSIM", "guidance", "stock s", "s"):
        table.add_column(name, justify="right")
    for one in result.bundles:
        table.add_row(
            one.name,
            f"{one.size / 1e6:,.1f}",
            *(f"{one.psnr_db[key]:.1f}" for key in ("median", "p5", "worst")),
            f"{one.ssim:.3f}",
            "–" if one.guidance_delta is None else f"{one.guidance_delta:.3f}",
            f"{one.seconds['stock']:.3g}",
            f"{one.seconds['bundle']:.3g}",
        )
    console.print(table)
    console.print(
        "dB: the median pair, what 5 % are below, the worst; s: a picture's, of stock diffusers and the bundle."
    )
    for one in result.bundles:
        worst = one.pairs[0]
        console.print(f"{one.name}: worst is {worst.prompt!r}, seed {worst.seed}, {worst.psnr_db:.1f} dB")
        for name, score in one.scores.items():
            low, high = score.difference.low, score.difference.high
            console.print(
                f"{one.name}: {name} {score.stock.value:.2f} → {score.bundle.value:.2f} "
                f"({low:+.2f} to {high:+.2f} at 95 %)"
            )
        if one.exported_from == "another folder":
            console.print(f"{one.name}: was exported from another folder than {result.folder['name']} is now")
        if one.passed is False:
            below = [
                pair for pair in one.pairs if result.min_psnr_db is not None and pair.psnr_db < result.min_psnr_db
            ]
            console.print(
                f"{one.name}: {len(below)} of {len(one.pairs)} prompts are below {result.min_psnr_db:g} dB, "
                f"the worst {worst.prompt!r}"
            )
