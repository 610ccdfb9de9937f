"""`evaluate`: FID, KID and CLIP score over guidance, several model folders and bundles in one harness."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.cli.train import SkipBadOpt

PathOpt = Path | None


@app.command("evaluate")
def evaluate_command(
    systems: Annotated[
        list[str], typer.Argument(help="Model folders and bundles: PATH, PATH@8 or PATH@8:euler.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Result folder to write.", show_default=False)],
    data: Annotated[PathOpt, typer.Option("--data", help="Folder of captioned pictures.")] = None,
    coco: Annotated[PathOpt, typer.Option("--coco", help="MS-COCO folder, in place of --data.")] = None,
    judge: Annotated[PathOpt, typer.Option("--judge", help="Judge from train-judge.")] = None,
    inception: Annotated[PathOpt, typer.Option("--inception", help="FID's Inception-v3 weights.")] = None,
    clip: Annotated[PathOpt, typer.Option("--clip", help="CLIP folder or open_clip weights.")] = None,
    clip_model: Annotated[str, typer.Option("--clip-model", help="open_clip's name of it.")] = "ViT-g-14",
    guidance: Annotated[str, typer.Option("--guidance", help="Guidance scales, with commas.")] = "1,2,3,4.5,6,8",
    steps: Annotated[
        str | None, typer.Option("--steps", help="One number, or one a system: 50,8. Default: each one's own.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Captions of each set; default 768. COCO: in all; default 30000.")
    ] = None,
    sets: Annotated[str, typer.Option("--sets", help="Sets of --data, with commas; pooled.")] = "test_combo",
    precision: Annotated[str, typer.Option("--precision", help="Of model folders: fp32 or bf16.")] = "fp32",
    seed: Annotated[int, typer.Option("--seed", help="Seed of every picture's noise.")] = 0,
    diversity_prompts: Annotated[int, typer.Option("--diversity-prompts", help="Prompts drawn again; 0: off.")] = 32,
    diversity_images: Annotated[int, typer.Option("--diversity-images", help="Pictures of each of them.")] = 4,
    kid_only: Annotated[bool, typer.Option("--kid-only", help="No FID: fewer pictures will do.")] = False,
    annotations: Annotated[PathOpt, typer.Option("--annotations", help="COCO's captions_*.json.")] = None,
    size: Annotated[int, typer.Option("--size", help="COCO: pixels scored at, 256 or 512.")] = 256,
    real: Annotated[str, typer.Option("--real", help="COCO: FID against `all` pictures or the `listed`.")] = "all",
    skip_bad: SkipBadOpt = False,
    store: Annotated[PathOpt, typer.Option("--store", help="Keep pictures here, to share them between runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")] = False,
) -> None:
    """Compare systems by their curves of FID and CLIP score over guidance.

    Same captions, noise and seeds for all. Where no sampler is named, a bundle draws with its own, a folder with DDIM.
    Pictures and points are kept in OUT.run: run again to go on after a stop. Under `accelerate launch` every process
    draws its share.
    """
    from pocketfusion.cli.extras import require_compress

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
