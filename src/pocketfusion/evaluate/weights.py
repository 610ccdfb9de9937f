"""Reading the weights that other projects publish, without unpickling anything."""

from __future__ import annotations

from pathlib import Path

import torch

from pocketfusion.errors import PocketfusionError


def read_weights(file: Path, what: str) -> dict[str, torch.Tensor]:
    """A state dict from safetensors, or from torch's own format read with `weights_only`.

    Raises PocketfusionError, naming `what`, if the file is missing, damaged, or holds anything but tensors.
    """
    if not file.is_file():
        raise PocketfusionError(f"there are no {what} at {file}: pocketfusion downloads nothing, give a local file")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        values = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PocketfusionError(f"{file} holds no {what} that can be read safely ({reason[:120]})") from None
    if not isinstance(values, dict) or not all(isinstance(value, torch.Tensor) for value in values.values()):
        raise PocketfusionError(f"{file} holds no {what}: it is not a plain dictionary of tensors")
    return values
