"""The commands: each parses, calls one function and prints a table. Heavy imports wait until a command runs."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from pocketfusion.errors import PocketfusionError

app = typer.Typer(
    name="pocketfusion",
    help="Make a Stable-Diffusion-class text-to-image model small, few-step and ready for phones.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from pocketfusion import __version__

        typer.echo(f"pocketfusion {__version__}")
        raise typer.Exit


VersionOpt = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
]


@app.callback()
def _options(version: VersionOpt = False) -> None:
    pass


def main() -> None:
    """Entry point of the `pocketfusion` command: exit code 2 and one sentence on bad input, never a traceback."""
    from pocketfusion.cli import commands  # noqa: F401  (registers them)

    atexit.register(_silence_libraries)
    try:
        app()
    except PocketfusionError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _silence_libraries() -> None:
    """LiteRT logs its own end on standard error, after Python's."""
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
