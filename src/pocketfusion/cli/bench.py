"""`bench`: what bundles cost on this machine, measured in turns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import parse_size
from pocketfusion.cli.shared_options import ThreadsOpt
from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from pocketfusion.runtime.residency import Mode
    from pocketfusion.terminal import Console


@app.command("bench")
def bench_command(
    bundles: Annotated[
        list[Path] | None, typer.Argument(metavar="[BUNDLE]...", help="Bundles. Default: the embedded one.")
    ] = None,
    runs: Annotated[int, typer.Option("--runs", help="Measured pictures of each bundle.")] = 10,
    threads: ThreadsOpt = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps. Default: each bundle's.")] = None,
    mode: Annotated[str, typer.Option("--mode", help="resident, pipelined or sequential.")] = "resident",
    every: Annotated[
        Path | None,
        typer.Option(
            "--all", metavar="FOLDER", help="Compare runtimes instead: this model folder's UNet on all that are here."
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="With --all: pictures' HEIGHTxWIDTH.", show_default="the model's")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", help="With --all: runtimes and weights, such as litert-cpu:int8,torch:bfloat16."),
    ] = None,
    cache: Annotated[Path | None, typer.Option("--cache", help="With --all: keep converted UNets here.")] = None,
    runtime: Annotated[
        str | None,
        typer.Option("--runtime", metavar="NAME", help="onnxruntime, openvino or openvino-bf16, of ONNX bundles."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows here.")] = None,
) -> None:
    """Measure bundles in turns: load, compile, text, steps, decode, memory; ratios against the first.

    With --all FOLDER, one UNet on every runtime: step, load, memory, file, and the PSNR of its pictures to PyTorch's.
    """
    from pocketfusion.cli.bench_all import bench_all, refuse_alone

    if every is not None:
        if bundles:
            raise PocketfusionError(f"--all compares runtimes on one model folder: leave {bundles[0]} out")
        if runtime is not None:
            raise PocketfusionError(f"--all is of every runtime and --runtime is {runtime}: choose by --only instead")
        pixels = None if size is None else parse_size(size)
        bench_all(
            every, runs=runs, threads=threads, steps=steps, size=pixels, only=only, cache=cache, json_file=json_file
        )
        return
    refuse_alone(size=size, only=only, cache=cache)
    from rich.progress import Progress

    from pocketfusion.artefact import check_files, write_json
    from pocketfusion.runtime.bench import Settings, bench
    from pocketfusion.runtime.manifest import embedded_bundle
    from pocketfusion.terminal import Console

    check_files(json_file)
    paths = bundles or [embedded_bundle()]
    settings = Settings(runs, threads, steps, cast("Mode", mode), runtime=runtime)
    notes = Console(stderr=True)
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        task = progress.add_task("drawing", total=len(paths) * (1 + max(runs, 0)))
        rows = bench(paths, settings, lambda: progress.advance(task))
    _print(Console(markup=False, highlight=False, soft_wrap=True), rows, settings.runs)
    if json_file is not None:
        write_json(json_file, {"bundles": rows, "runs": runs, "prompt": settings.prompt, "energy": None})


def _print(console: Console, rows: list[dict[str, Any]], runs: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("bundle")
    for name in ("load", "compile", "text", "step", "decode", "rest", "total", "ratio", "peak RSS"):
        table.add_column(name, justify="right")
    for row in rows:
        times = row["seconds"]
        table.add_row(
            Path(row["path"]).name,
            _ms(times["open"]),
            _ms(times["compile"]),
            *(_ms(times[name]["median"]) for name in ("text", "step", "decode", "rest", "total")),
            f"{row['ratio']:.2f}x",
            f"{row['peak_rss'] / 1e6:.0f} MB" if row["peak_rss"] else "not told",
        )
    console.print(table)
    console.print(f"Times in ms, median of {runs} pictures of each bundle, after one unmeasured.")
    console.print(
        "Load (open and verify) and compile: once, at each process's start. Rest: networks loaded and freed meanwhile."
    )
    if len(rows) > 1:
        console.print("Bundles in turns, each in a process of its own; ratio: the first one's total to its own.")
    for row in rows:
        times = row["seconds"]
        width, height = row["image_size"]
        spans = (f"{name} {_ms(times[name]['min'])} to {_ms(times[name]['max'])}" for name in ("step", "total"))
        console.print(f"{Path(row['path']).name} ({row['bundle']['name']}): {', '.join(spans)};")
        console.print(
            f"  {width}×{height}, {row['num_inference_steps']} steps, {row['guidance']} guidance "
            f"{row['guidance_scale']:g}, UNet batch {row['unet_batch']}, "
            f"weights {_weights(row['bundle']['weights'])}, mode {row['mode']}."
        )
    about, runtimes = rows[0], ", ".join(dict.fromkeys(row["runtime"] for row in rows))
    console.print(f"{about['cpu']}, {about['threads']} threads, {runtimes}, Python {about['python']}.")
    console.print("Energy: not measured.")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _weights(weights: dict[str, str]) -> str:
    """One kind, or the three: text encoder, UNet, decoder."""
    return next(iter(set(weights.values()))) if len(set(weights.values())) == 1 else " / ".join(weights.values())
