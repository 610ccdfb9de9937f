"""`architecture`: which blocks a UNet has, what it costs, and published architectures applied to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder
from pocketfusion.errors import PocketfusionError


@app.command("architecture")
def architecture_command(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Model folder, or sd-1.5 or sd-2.1.", show_default=False)
    ],
    preset: Annotated[str | None, typer.Option("--preset", help="Architecture to apply: snapfusion.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write FOLDER with the preset's UNet here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")] = False,
) -> None:
    """Show a UNet's blocks per stage, parameters and multiply-adds, beside a preset's.

    With --out the preset is applied to the folder: weights are carried over, nothing is trained.
    """
    from pocketfusion.cli.extras import require_compress

    require_compress()
    from pocketfusion.architecture_report import describe, open_base, table, write_preset
    from pocketfusion.terminal import Console

    if out is not None and preset is None:
        raise PocketfusionError("--out alone changes nothing: name what to apply, such as --preset snapfusion")
    base = open_base(str(model_folder(Path(source))))
    report = describe(base, preset)
    if out is not None and preset is not None:
        write_preset(base, preset, out, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table(report))
    for note in report.notes:
        console.print(note)
    if out is not None:
        console.print(f"written to {out}")
