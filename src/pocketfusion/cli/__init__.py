"""The commands: each parses, calls one function and prints a table. Heavy imports wait until a command runs."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from pocketfusion.errors import PocketfusionError, told
from pocketfusion.terminal import Console


class Commands(TyperGroup):
    """Typer takes the end of a file that is read for the end of the terminal's input, and would say "Aborted"."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # its own copy of click's class
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise PocketfusionError(told(error)) from None


app = typer.Typer(
    name="pocketfusion",
    cls=Commands,
    help="Make a Stable-Diffusion-class text-to-image model small, few-step and ready for phones.",
    no_args_is_help=True,
    add_completion=True,
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
    """Entry point of the `pocketfusion` command: exit code 2 and one sentence on whatever fails, never a traceback
    but for a fault of the program."""
    _mend_streams()
    from pocketfusion.cli import commands  # noqa: F401  (registers them)

    atexit.register(_silence_libraries)
    try:
        try:
            _know_the_shell(sys.argv[1:])
            app()
        finally:
            sys.stdout.flush()  # a full device shows here
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader has seen enough
        _drop_output()
        sys.exit(1)
    except SystemExit:
        raise
    except BaseException as error:  # a native library's panic is no Exception
        sentence = told(error)
        if sentence is None:
            raise
        with suppress(OSError, ValueError):
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {escape(sentence)}")
        _drop_output()
        sys.exit(2)


_SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")  #: that Typer writes completions for


def _know_the_shell(arguments: list[str]) -> None:
    """Raises PocketfusionError if completion is wanted in a shell that has none: Typer would say less."""
    if not {"--install-completion", "--show-completion"} & set(arguments[:1]):
        return
    import shellingham

    try:
        shell = shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        shell = "unknown"
    if shell not in _SHELLS:
        raise PocketfusionError(
            f"this shell is {shell}: run it in one of {', '.join(_SHELLS)} to have completion there"
        )


def _mend_streams() -> None:
    """Opens the standard streams that are closed, or the first file would take their number and libraries' messages;
    and lets what the terminal's encoding lacks be printed as escapes."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """What standard output still holds goes nowhere: it could not be written, and would fail again at the end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _silence_libraries() -> None:
    """LiteRT logs its own end on standard error, after Python's."""
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
