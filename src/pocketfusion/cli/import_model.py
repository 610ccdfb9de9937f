"""`import`: a model folder of a checkpoint in one file, of another folder, or of the Hub."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pocketfusion.models.bring.importer import Found


class Predicts(str, Enum):
    """What a UNet may predict."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"


@app.command("import")
def import_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[SOURCE] OUT",
            help="Checkpoint (.safetensors) or model folder, and the folder to write; with --from-hub OUT alone.",
            show_default=False,
        ),
    ],
    from_hub: Annotated[
        str | None,
        typer.Option(
            "--from-hub", metavar="ID", help="OWNER/NAME or OWNER/NAME/FILE.safetensors of the Hugging Face Hub."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub (main if not given).")
    ] = None,
    prediction_type: Annotated[
        Predicts | None,
        typer.Option("--prediction-type", help="What the UNet predicts, where the file says it wrong or not at all."),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema/--no-ema", help="Take the averaged weights where the file has both.")
    ] = True,
    clip_skip: Annotated[
        int, typer.Option("--clip-skip", metavar="N", help="Leave out the text encoder's last N - 1 layers.")
    ] = 1,
    vae: Annotated[
        Path | None, typer.Option("--vae", help="Autoencoder to take instead: a file, or a folder with config.json.")
    ] = None,
    embedding: Annotated[
        list[Path] | None,
        typer.Option("--embedding", help="Textual inversion (safetensors) to add. Repeatable.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an OUT that exists.")] = False,
) -> None:
    """Make a model folder of a Stable Diffusion 1 or 2 checkpoint: one file, a folder, or a repository of the Hub.

    Without --from-hub nothing is downloaded, and nothing is ever unpickled. Commands that take a model folder take a
    checkpoint's file as well, and import it first.

        pocketfusion import dreamshaper_8.safetensors dreamshaper

        pocketfusion import anything.safetensors out --vae kl-f8-anime2.safetensors --clip-skip 2

        pocketfusion import --from-hub stable-diffusion-v1-5/stable-diffusion-v1-5 sd15
    """
    if len(paths) != (1 if from_hub else 2):
        wanted = "OUT alone" if from_hub else "SOURCE and OUT"
        raise PocketfusionError(f"give {wanted}: {len(paths)} paths are given ({', '.join(map(str, paths))})")
    if revision is not None and from_hub is None:
        raise PocketfusionError(f"--revision {revision} is of the Hub: give --from-hub with it, or leave it out")
    from pocketfusion.artefact import check_new
    from pocketfusion.cli.extras import require_compress

    out = paths[-1]
    check_new(out, overwrite)
    require_compress()
    from pocketfusion.cli.given import stages
    from pocketfusion.models.bring.importer import Changes, import_file, import_folder

    changes = Changes(
        prediction_type=prediction_type.value if prediction_type else None,
        ema=ema,
        clip_skip=clip_skip,
        vae=vae,
        embeddings=tuple(embedding or ()),
    )
    with stages() as on_stage:
        source, origin = paths[0], None
        if from_hub is not None:
            from pocketfusion.models.bring.hub import fetch

            on_stage(f"fetching {from_hub}")
            branch = revision or "main"
            fetched = fetch(from_hub, branch)
            source, origin = fetched.path, {"repository": from_hub, "revision": branch, "commit": fetched.commit}
        elif source.is_dir() and changes == Changes():
            raise PocketfusionError(f"{source} is a folder already: give it to the other commands as it is")
        function = import_folder if source.is_dir() else import_file
        found = function(source, out, changes, overwrite=overwrite, origin=origin, on_stage=on_stage)
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
    if found.tokens:
        rows.append(("learnt tokens", ", ".join(found.tokens)))
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
