"""`import`: a model folder of a checkpoint in one file."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pocketfusion.models.bring.importer import Found


class Predicts(str, Enum):
    """What a UNet may predict."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="Checkpoint (.safetensors).", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Model folder to write.", show_default=False)],
    prediction_type: Annotated[
        Predicts | None,
        typer.Option(
            "--prediction-type", help="What the UNet predicts, where the file does not say or says it wrong."
        ),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Take the averaged weights where the file has both.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")] = False,
) -> None:
    """Make a model folder of a Stable Diffusion 1 or 2 checkpoint in one file.

    Nothing is downloaded and nothing unpickled. Every other command that takes a model folder takes the file as well.

        pocketfusion import dreamshaper_8.safetensors dreamshaper

        pocketfusion import v2-1_768-ema-pruned.safetensors sd21 --prediction-type v_prediction
    """
    from pocketfusion.cli.extras import require_compress

    require_compress()
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from pocketfusion.models.bring.importer import Changes, import_file

    changes = Changes(prediction_type=prediction_type.value if prediction_type else None, ema=ema)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading the header", total=None)
        found = import_file(
            file, out, changes, overwrite=overwrite, on_stage=lambda stage: bar.update(task, description=stage)
        )
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    show(found, out)


def show(found: Found, out: Path) -> None:
    """Prints what was found in a checkpoint."""
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    predicts = f"{found.prediction_type} ({found.prediction_why})"
    if found.zero_snr:
        predicts += "; the schedule ends without signal"
    rows = [
        ("family", found.family),
        ("predicts", predicts),
        ("pictures", f"{found.picture_size} px"),
        ("UNet", found.unet),
        ("text encoder", found.text_encoder),
        ("VAE", found.vae),
        ("weights", found.weights),
    ]
    if found.leftovers:
        rows.append(("left out", ", ".join(f"{kind} ({count})" for kind, count in found.leftovers.items())))
    if found.unused:
        more = f" and {found.unused_count - len(found.unused)} more" if found.unused_count > len(found.unused) else ""
        rows.append(("not known", ", ".join(found.unused) + more))
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}")
    console.print(f"written to {out}")
