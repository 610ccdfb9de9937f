"""What `export --target onnx` may be asked for, checked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pocketfusion.errors import INSTALL_ONNX_EXPORT, PocketfusionError
from pocketfusion.folder import read_json
from pocketfusion.mobile.outside_loops import check_outside_loop

if TYPE_CHECKING:
    from pocketfusion.mobile.export_settings import ExportSettings

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_onnx_options(settings: ExportSettings, folder: Path) -> None:
    """Raises PocketfusionError for what an ONNX bundle cannot be."""
    if settings.target != "onnx":
        return
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise PocketfusionError(f"--target onnx needs {', '.join(missing)}: {INSTALL_ONNX_EXPORT}")
    if settings.recipe is not None:
        raise PocketfusionError("--recipe is of LiteRT's targets: choose ONNX's weights by --weights and its kin")
    if settings.layout == "diffusers":
        check_outside_loop(settings, folder)
        if (channels := read_json(folder / "unet" / "config.json").get("in_channels")) != 4:
            raise PocketfusionError(
                f"--layout diffusers is of latents of 4 channels, and {folder} has {channels}: choose --layout bundle"
            )
