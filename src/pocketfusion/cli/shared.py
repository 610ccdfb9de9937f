"""What commands share: a model as given, imported first if it is one file; the extras that they need."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from pocketfusion.errors import INSTALL_COMPRESS, INSTALL_COREML, INSTALL_ONNX_EXPORT, PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.terminal import Console


def model_folder(path: Path) -> Path:
    """The model folder for what a command is given: a checkpoint's file is imported first, and standard error says
    where to. Raises PocketfusionError if it cannot be."""
    if not path.is_file():
        return path

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


COMPRESS = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "yaml")


def require(*modules: str) -> None:
    """Raises PocketfusionError unless all `modules` are installed."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise PocketfusionError(f"this command needs {', '.join(missing)}: {INSTALL_COMPRESS}")


def require_compress() -> None:
    """Raises PocketfusionError unless the `[compress]` extra is installed; silences its libraries' chatter."""
    require(*COMPRESS)
    quiet_libraries()


def require_coreml(what: str) -> None:
    """Raises PocketfusionError unless the extras that `what` needs are installed, `[compress]` and `[coreml]`."""
    missing = [name for name in (*COMPRESS, "coremltools", "sklearn") if find_spec(name) is None]
    if missing:
        raise PocketfusionError(f"{what} needs {', '.join(missing)}: {INSTALL_COREML}")
    quiet_libraries()


def require_onnx(what: str) -> None:
    """Raises PocketfusionError unless the extras that `what` needs are installed, `[compress]` and `[onnx]`."""
    missing = [name for name in (*COMPRESS, "onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise PocketfusionError(f"{what} needs {', '.join(missing)}: {INSTALL_ONNX_EXPORT}")
    quiet_libraries()


def quiet_libraries() -> None:
    """Silences warnings and progress bars that tell a user nothing; imports the libraries."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    with quiet():  # torchao, which litert-torch brings, complains of GPU extensions when a network is first named
        import diffusers
        import transformers

        diffusers.UNet2DConditionModel  # noqa: B018

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
