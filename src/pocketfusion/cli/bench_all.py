"""`bench --all`: the table of runtimes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from pocketfusion.contest.rounds import Table
    from pocketfusion.terminal import Console


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
    _print(Console(markup=False, highlight=False, soft_wrap=True), table)


def refuse_alone(**given: object) -> None:
    """Raises PocketfusionError for an option of `bench --all` that is given without it."""
    for option, value in given.items():
        if value is not None:
            raise PocketfusionError(f"--{option} is of bench --all FOLDER: give that, or leave --{option} out")


def _print(console: Console, table: Table) -> None:
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


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"
