"""`evaluate`, `score`, `card`, `compare`: what pictures are worth, and what a bundle lost."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder
from pocketfusion.cli.shared_options import (
    ClipModelOpt,
    JsonOpt,
    PicturesOpt,
    ReplaceOpt,
    ResultOpt,
    SeedOpt,
    SkipBadOpt,
    ThreadsOpt,
)
from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from pocketfusion.evaluate.comparison.compare import Comparison
    from pocketfusion.terminal import Console


@app.command("evaluate")
def evaluate_command(
    systems: Annotated[
        list[str], typer.Argument(help="Model folders and bundles: PATH, PATH@8 or PATH@8:euler.", show_default=False)
    ],
    out: ResultOpt,
    data: Annotated[Path | None, typer.Option("--data", help="Folder of captioned pictures.")] = None,
    coco: Annotated[Path | None, typer.Option("--coco", help="MS-COCO folder, in place of --data.")] = None,
    judge: Annotated[Path | None, typer.Option("--judge", help="Judge from train-judge.")] = None,
    inception: Annotated[Path | None, typer.Option("--inception", help="FID's Inception-v3 weights.")] = None,
    clip: Annotated[Path | None, typer.Option("--clip", help="CLIP folder or open_clip weights.")] = None,
    clip_model: ClipModelOpt = "ViT-g-14",
    guidance: Annotated[str, typer.Option("--guidance", help="Guidance scales, with commas.")] = "1,2,3,4.5,6,8",
    steps: Annotated[
        str | None, typer.Option("--steps", help="One number, or one a system: 50,8. Default: each one's own.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Captions of each set; default 768. COCO: in all; default 30000.")
    ] = None,
    sets: Annotated[str, typer.Option("--sets", help="Sets of --data, with commas; pooled.")] = "test_combo",
    precision: Annotated[str, typer.Option("--precision", help="Of model folders: fp32 or bf16.")] = "fp32",
    seed: SeedOpt = 0,
    diversity_prompts: Annotated[int, typer.Option("--diversity-prompts", help="Prompts drawn again; 0: off.")] = 32,
    diversity_images: Annotated[int, typer.Option("--diversity-images", help="Pictures of each of them.")] = 4,
    kid_only: Annotated[bool, typer.Option("--kid-only", help="No FID: fewer pictures will do.")] = False,
    annotations: Annotated[Path | None, typer.Option("--annotations", help="COCO's captions_*.json.")] = None,
    size: Annotated[int, typer.Option("--size", help="COCO: pixels scored at, 256 or 512.")] = 256,
    real: Annotated[str, typer.Option("--real", help="COCO: FID against `all` pictures or the `listed`.")] = "all",
    skip_bad: SkipBadOpt = False,
    store: Annotated[
        Path | None, typer.Option("--store", help="Keep pictures here, to share them between runs.")
    ] = None,
    as_json: JsonOpt = False,
    overwrite: ReplaceOpt = False,
) -> None:
    """Compare systems by their curves of FID and CLIP score over guidance.

    Same captions, noise and seeds for all. Where no sampler is named, a bundle draws with its own, a folder with DDIM.
    Pictures and points are kept in OUT.run: run again to go on after a stop. Under `accelerate launch` every process
    draws its share.
    """
    from pocketfusion.cli.shared import require_compress

    require_compress()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pocketfusion.evaluate.extractors import open_extractor
    from pocketfusion.evaluate.fid_clip.curves import parse_guidance
    from pocketfusion.evaluate.fid_clip.curves_report import remarks, table
    from pocketfusion.evaluate.fid_clip.curves_run import Measuring, evaluate_systems, processes
    from pocketfusion.evaluate.reference import ReferenceSource
    from pocketfusion.evaluate.systems import named_systems
    from pocketfusion.terminal import Console, printable_json

    source = ReferenceSource(data, coco, sets, samples, seed, annotations, size, real, skip_bad)
    measuring = Measuring(parse_guidance(guidance), seed, diversity_prompts, diversity_images, kid_only)
    chosen = named_systems(systems, steps, precision, model_folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    first = processes().is_main_process
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not first) as bar:
        task = bar.add_task("opening", total=None)

        def advance(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        result = evaluate_systems(
            chosen,
            lambda drawn: source.open(drawn, partial(advance, "reading every picture")),
            lambda: open_extractor(judge, inception, clip, clip_model),
            out,
            measuring,
            store=store,
            overwrite=overwrite,
            progress=advance,
        )
    if result is None:  # the first process writes and reports
        return
    if as_json:
        typer.echo(printable_json(result.model_dump_json(indent=2)))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table(result))
    for line in remarks(result):
        console.print(line)
    console.print(f"written to {out}: curve.json, curve.md, curve.png, pictures.png")


@app.command("score")
def score_command(
    folder: Annotated[Path, typer.Argument(help="Model folder to score.", show_default=False)],
    data: PicturesOpt,
    judge: Annotated[Path, typer.Option("--judge", help="Judge from train-judge.", show_default=False)],
    out: ResultOpt,
    steps: Annotated[int, typer.Option("--steps", help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", help="Guidance scale.")] = 4.0,
    samples: Annotated[int, typer.Option("--samples", help="Pictures of each set.")] = 256,
    seed: SeedOpt = 0,
    sets: Annotated[
        str | None, typer.Option("--sets", help="Sets, with commas. Default: training pairs and all test sets.")
    ] = None,
    as_json: JsonOpt = False,
    overwrite: ReplaceOpt = False,
    skip_bad: SkipBadOpt = False,
) -> None:
    """Score a model folder: CLIP score, retrieval, Fréchet distance, copying, and checkable scenes.

    Each set has a ceiling (real pictures) and a floor (shuffled captions); the scores are our own judge's.
    """
    from pocketfusion.cli.shared import require_compress

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
    from pocketfusion.cli.shared import require_compress

    require_compress()
    from pocketfusion.evaluate.score.card import write_card

    typer.echo(f"written: {write_card(folder, scores, notes)}")


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
    clip: Annotated[Path | None, typer.Option("--clip", help="CLIP folder or open_clip weights, to score.")] = None,
    clip_model: ClipModelOpt = "ViT-g-14",
    judge: Annotated[Path | None, typer.Option("--judge", help="Judge from train-judge, to score.")] = None,
    min_psnr: Annotated[
        float | None, typer.Option("--min-psnr", metavar="DB", help="Exit with code 1 if a pair is below.")
    ] = None,
    threads: ThreadsOpt = None,
) -> None:
    """Show what bundles draw beside stock diffusers: same prompts, same noise, worst pairs first.

    Writes a self-contained page and a JSON file. Settings that are not given are each bundle's own.
    """
    from pocketfusion.artefact import atomic_file, check_files
    from pocketfusion.cli.shared import require_compress

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
    _print_comparison(console, result)
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


def _print_comparison(console: Console, result: Comparison) -> None:
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
