"""`profile`: the latency table of a UNet's blocks on the target runtime."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder

if TYPE_CHECKING:
    from pocketfusion.latency.table import LatencyTable
    from pocketfusion.terminal import Console


@app.command("profile")
def profile_command(
    folder: Annotated[str, typer.Argument(help="Model folder, or sd-1.5 or sd-2.1.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Table to write; its picture comes beside it.")
    ] = None,
    backend: Annotated[str, typer.Option("--backend", help="litert-cpu, litert-gpu or torch.")] = "litert-cpu",
    weights: Annotated[
        str, typer.Option("--weights", help="float32, float16 or int8; with torch float32 or bfloat16.")
    ] = "float32",
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, with commas; 2 is a guided step.")] = "1,2",
    runs: Annotated[int, typer.Option("--runs", help="Rounds that count: the calmer half of twice as many.")] = 30,
    threads: Annotated[int | None, typer.Option("--threads", help="Default: the cores this process may use.")] = None,
    validate: Annotated[int, typer.Option("--validate", help="Architectures to check predictions against.")] = 0,
    base_only: Annotated[
        bool,
        typer.Option("--base-only", help="Only the base's own blocks and shortcuts, not what `evolve` may put there."),
    ] = False,
    cache: Annotated[Path | None, typer.Option("--cache", help="Keep exported blocks here for the next time.")] = None,
    pack: Annotated[
        Path | None, typer.Option("--pack", help="Measure nothing: write a pack for a phone here.")
    ] = None,
    imported: Annotated[
        Path | None, typer.Option("--import", help="Measure nothing: read the logs of this pack.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT or the pack.")] = False,
) -> None:
    """Time every block of a UNet on the target runtime, and predict whole networks from the blocks."""
    from pocketfusion.cli.shared import require, require_compress
    from pocketfusion.errors import PocketfusionError

    require_compress()
    require("litert_torch", "matplotlib")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from pocketfusion.artefact import check_files, check_new
    from pocketfusion.quiet import quiet
    from pocketfusion.runtime.networks import available_cores
    from pocketfusion.temporaries import scratch_folder
    from pocketfusion.terminal import Console, printable_json

    if pack and imported:
        raise PocketfusionError("--pack and --import exclude each other: pack first, run the script, then import")
    if not pack:
        if out is None:
            raise PocketfusionError("--out is missing: say where to write the table, such as --out latency.json")
        check_files(out, out.with_suffix(".png"))
        for file in (out, out.with_suffix(".png")):
            if file.exists() and not overwrite:
                raise PocketfusionError(f"{file} exists already: choose another --out or pass --overwrite")
    else:
        check_new(pack, overwrite)
    if runs < 1 or validate < 0:
        raise PocketfusionError(f"--runs is {runs} and --validate {validate}: choose 1 or more and 0 or more")
    batches = _batches(batch)
    with quiet():  # the libraries' import messages
        from pocketfusion.latency import breakdown
        from pocketfusion.latency import phone_pack as packs
        from pocketfusion.latency import table as tables
        from pocketfusion.latency.profiling import measure
        from pocketfusion.latency.target import load_target, validation_architectures
        from pocketfusion.latency.timing_backends import make_backend
        from pocketfusion.latency.unet_parts import base_shapes

    folder = str(model_folder(Path(folder)))
    if cache:
        cache.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        nullcontext(cache) if cache else scratch_folder("pocketfusion-profile") as directory,
        Progress(*columns, console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("loading", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        cores = available_cores() if threads is None else threads
        chosen = make_backend(backend, weights, cores, directory)
        if not pack and not imported:
            chosen.check()
        table = packs.import_pack(imported) if imported else None
        target = load_target(folder)
        if table is not None:
            wanted = base_shapes(target.config)
            differing = [key for key, value in table.base.items() if wanted[key] != value]
            if differing:
                raise PocketfusionError(
                    f"{imported} is a pack of another base than {folder}: {differing[0]} is "
                    f"{table.base[differing[0]]}, not {wanted[differing[0]]}"
                )
        elif pack:
            arguments = {"batches": batches, "base_only": base_only, "overwrite": overwrite, "progress": progress}
            count = packs.write_pack(target, chosen, pack, **arguments)  # type: ignore[arg-type]
            Console(highlight=False, markup=False).print(
                f"{pack}: {count} networks; run {pack}/{packs.SCRIPT} BENCHMARK_MODEL with the phone on adb, then "
                f"pocketfusion profile {folder} --import {pack} --out latency.json"
            )
            return
        else:
            architectures = validation_architectures(target.config, validate)
            if target.evolved:
                architectures = {f"{folder} itself": target.architecture, **architectures}
            table = measure(
                target,
                chosen,
                batches=batches,
                runs=runs,
                base_only=base_only,
                validation=architectures,
                progress=progress,
            )
    assert out is not None and isinstance(table, tables.LatencyTable)
    table.save(out)
    breakdown.plot_table(table, out.with_suffix(".png"))
    if as_json:
        typer.echo(printable_json(table.model_dump_json(indent=2)))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _print(table, console)
    console.print(f"written: {out}, {out.with_suffix('.png')}")


def _batches(text: str) -> list[int]:
    from pocketfusion.errors import PocketfusionError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise PocketfusionError(f"--batch is {text!r}: give numbers with commas, such as 1,2")
    return sorted(set(map(int, parts)))


def _print(table: LatencyTable, console: Console) -> None:
    from rich.table import Table

    from pocketfusion.latency.breakdown import breakdown, removal_savings

    settings, batches = table.settings, sorted(table.overhead)
    console.print(
        f"{settings.runtime}, {settings.backend}, {settings.weights} weights, "
        f"threads: {settings.threads}, {settings.device}"
    )
    shown = Table("stage", "kind", "blocks", "parameters", "MACs", *(f"ms b={batch}" for batch in batches))
    columns = {batch: breakdown(table, batch) for batch in batches}
    for rows in zip(*columns.values(), strict=True):
        row = rows[0]
        sizes = (f"{row.parameters / 1e6:.2f} M", f"{row.macs / 1e6:,.0f} M")
        shown.add_row(row.stage, row.kind, f"{row.blocks}", *sizes, *(f"{one.ms:,.2f}" for one in rows))
    for name, entry in table.networks.items():
        sizes = (f"{entry.parameters / 1e6:.2f} M", f"{entry.macs / 1e6:,.0f} M")
        # its time stands in the first column of times, and its name says the batch
        shown.add_row("", name.replace("_", " ") + " (batch 1)", "", *sizes, f"{entry.ms[1].median:,.2f}")
    for column in shown.columns[2:]:
        column.justify = "right"
    console.print(shown)
    for batch in batches:
        one = table.overhead[batch]
        console.print(
            f"batch {batch}: whole UNet {one.whole.median:,.2f} ms ({one.whole.min:,.2f} to {one.whole.max:,.2f}, "
            f"{one.whole.runs} runs), sum of {one.count} parts {one.parts:,.2f} ms, overhead "
            f"{1000 * one.per_part:+,.1f} µs a part (an empty call: {1000 * one.empty:,.1f} µs)"
        )
    batch = max(batches)
    best = ", ".join(f"{name} {saved:,.2f} ms" for name, saved in removal_savings(table, batch)[:8])
    console.print(f"removal saves most, batch {batch}: {best}")
    if table.validation:
        checks = Table("architecture", "measured ms", "predicted ms", "error")
        for check in table.validation:
            measured, predicted = f"{check.measured.median:,.2f}", f"{check.predicted:,.2f}"
            checks.add_row(check.name, measured, predicted, f"{100 * check.error:+.1f} %")
        for column in checks.columns[1:]:
            column.justify = "right"
        console.print(checks)
        errors = [abs(check.error) for check in table.validation]
        console.print(
            f"prediction error: mean {100 * sum(errors) / len(errors):.1f} %, worst {100 * max(errors):.1f} %"
        )
