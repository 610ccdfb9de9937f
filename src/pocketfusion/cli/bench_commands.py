"""`bench`: time and memory of bundles in turns, and one table of every runtime."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import parse_size
from pocketfusion.cli.shared_options import ThreadsOpt
from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from pocketfusion.contest.rounds import Table
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


def bench_all(
    folder: Path,
    *,
    runs: int,
    threads: int | None,
    steps: int | None,
    size: tuple[int, int] | None,
    only: str | None,
    cache: Path | None,
    json_file: Path | None,
) -> None:
    """Measures the model folder's UNet on every runtime and prints the table; see `contest.rounds.contest`."""
    from pocketfusion.cli.shared import require_compress

    require_compress()
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pocketfusion.artefact import check_files, write_json
    from pocketfusion.cli.shared import model_folder
    from pocketfusion.quiet import quiet
    from pocketfusion.runtime.networks import available_cores, check_threads
    from pocketfusion.temporaries import scratch_folder
    from pocketfusion.terminal import Console

    with quiet():  # the libraries' import messages
        from pocketfusion.contest.contenders import Subject, parse
        from pocketfusion.contest.rounds import contest

    check_files(json_file)
    names, cores = parse(only), check_threads(available_cores() if threads is None else threads)
    folder = model_folder(folder)
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    notes = Console(stderr=True)
    with (
        nullcontext(cache) if cache else scratch_folder("pocketfusion-bench") as directory,
        Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar,
    ):
        task = bar.add_task("", total=None)
        subject = Subject(str(folder), size, cores, str(directory))
        table = contest(
            subject, names, runs=runs, steps=steps, progress=lambda stage: bar.update(task, description=stage)
        )
    if json_file is not None:
        write_json(json_file, table.as_dict())
    _print_all(Console(markup=False, highlight=False, soft_wrap=True), table)


def refuse_alone(**given: object) -> None:
    """Raises PocketfusionError for an option of `bench --all` that is given without it."""
    for option, value in given.items():
        if value is not None:
            raise PocketfusionError(f"--{option} is of bench --all FOLDER: give that, or leave --{option} out")


def _print_all(console: Console, table: Table) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Lines

    lines = Lines(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    lines.add_column("runtime", no_wrap=True)
    for name in ("step ms", "speed", "load s", "RSS MB", "file MB", "PSNR dB"):
        lines.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        step, memory, alike = row["step_seconds"], row["peak_rss"], row["psnr_db"]
        lines.add_row(
            f"{row['name']}{', software' if row['software'] else ''}",
            _ms(step["median"]),
            f"{row['ratio']:.2f}x",
            f"{row['load_seconds']:.1f}",
            f"{memory / 1e6:,.0f}" if memory else "not told",
            f"{row['size'] / 1e6:,.1f}",
            "equal" if alike == 100 else f"{alike:.1f}",
        )
    console.print(lines)
    for row in table.rows:
        step, on = row["step_seconds"], f", on {row['device']}" if row["device"] else ""
        console.print(f"{row['name']}: step {_ms(step['min'])} to {_ms(step['max'])}{on};")
    for name, reason in table.left_out.items():
        console.print(f"{name} is left out: {reason}.")
    about = table.about
    (width, height), versions = about["image_size"], ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    pictures = "1 picture" if about["runs"] == 1 else f"{about['runs']} pictures"
    console.print(
        f"Step: the UNet's call of batch {about['unet_batch']}, median of {about['steps']} steps of "
        f"{pictures}, in turns, after one unmeasured call."
    )
    console.print("Speed: PyTorch's eager float32 step to its own. Load: from the file to the end of that first call,")
    console.print("with the import. RSS: the process's peak. PSNR: of the pictures to PyTorch's, by the same decoder.")
    console.print(
        f"{about['folder']}: {width}×{height}, {about['guidance']} guidance {about['guidance_scale']:g}; "
        f"{about['cpu']}, {about['threads']} threads, {versions}, Python {about['python']}."
    )
