"""What a command is given as a model: a folder, or a checkpoint's file that is imported first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console


def model_folder(path: Path) -> Path:
    """The model folder for what a command is given: a checkpoint's file is imported first, and standard error says
    where to. Raises PocketfusionError if it cannot be."""
    if not path.is_file():
        return path
    from pocketfusion.cli.extras import require_compress

    require_compress()
    from pocketfusion.models.bring.door import open_model

    said: list[str] = []
    with stages() as on_stage:
        folder = open_model(path, said.append, on_stage)
    for sentence in said:
        Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(sentence)
    return folder


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what an import is doing, and for how long."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the header", total=None)
        yield lambda stage: bar.update(task, description=stage)


def parse_size(text: str) -> tuple[int, int]:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdigit() and width.isdigit()):
        raise PocketfusionError(f"--size is {text!r}: give height and width in pixels, such as 512x512")
    return int(height), int(width)
