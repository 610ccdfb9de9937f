"""Says which extra to install when a command's libraries are missing, and keeps those libraries quiet."""

from __future__ import annotations

import warnings
from importlib.util import find_spec

from pocketfusion.errors import INSTALL_COMPRESS, INSTALL_COREML, INSTALL_ONNX_EXPORT, PocketfusionError
from pocketfusion.quiet import quiet

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
