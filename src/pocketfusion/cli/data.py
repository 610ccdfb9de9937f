"""`data`: builds data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.terminal import Console

data_app = typer.Typer(help="Build captioned data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@data_app.callback()
def _data() -> None:
    pass


@data_app.command("emoji")
def emoji_command(
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    size: Annotated[
        list[int] | None, typer.Option("--size", help="Pixels; may be repeated. Default: 64, 128.")
    ] = None,
    style: Annotated[
        list[str] | None, typer.Option("--style", help="Drawing style; may be repeated. Default: the eight free ones.")
    ] = None,
    scenes: Annotated[int, typer.Option(help="How many composed scenes to add.")] = 3000,
    variants: Annotated[int, typer.Option(help="Scaled and shifted renderings added per training drawing.")] = 0,
    skin_tones: Annotated[bool, typer.Option("--skin-tones", help="Add the skin-tone variants.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of scenes and variants.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Where fetched packages are kept.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Build the captioned emoji data set from its pinned packages (same settings, same bytes)."""
    from pocketfusion.cli.extras import require

    require("resvg_py", "numpy", "PIL")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from pocketfusion.data.emoji.build import EmojiSettings, build_emoji
    from pocketfusion.data.emoji.packages import DEFAULT_STYLES

    settings = EmojiSettings(
        styles=tuple(dict.fromkeys(style or DEFAULT_STYLES)),
        sizes=tuple(sorted(set(size or (64, 128)))),
        scenes=scenes,
        variants=variants,
        skin_tones=skin_tones,
        seed=seed,
    )
    console = Console(highlight=False)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task("starting", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        manifest = build_emoji(out, settings, cache=cache, overwrite=overwrite, progress=progress)
    table = Table("split", "pictures")
    for split, count in manifest["splits"].items():
        table.add_row(split, f"{count:,}")
    table.add_row("all", f"{manifest['count']:,}", style="bold")
    console.print(table)
    console.print(f"{out}: {out / 'contact_sheet.png'} shows it, {out / 'LICENCES.md'} says whose drawings they are")
