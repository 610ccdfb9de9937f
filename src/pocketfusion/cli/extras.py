"""Says which extra to install when a command's libraries are missing."""

from __future__ import annotations

from importlib.util import find_spec

from pocketfusion.errors import PocketfusionError

COMPRESS = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "yaml")


def require_compress() -> None:
    """Raises PocketfusionError unless the `[compress]` extra is installed."""
    missing = [name for name in COMPRESS if find_spec(name) is None]
    if missing:
        raise PocketfusionError(f"this command needs {', '.join(missing)}: pip install 'pocketfusion[compress]'")
