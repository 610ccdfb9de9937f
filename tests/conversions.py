"""Conversion to LiteRT once for networks that are the same: it is nearly all of an export's time."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

_PLAIN = (int, float, str, bool, type(None), tuple, list)
_NOT_IN_THE_GRAPH = ("name_or_path",)  # where a folder lay


def kept_in(folder: Path, convert: Callable[..., None]) -> Callable[..., None]:
    """`mobile.export._convert_network` that keeps what it makes in `folder`. A network taken for another's would not
    pass the export's gate, which compares each file with PyTorch."""

    def converted(module: nn.Module, samples: Any, file: Path, settings: Any) -> None:
        kept = folder / f"{key(module, samples, settings.device)}.tflite"
        if not kept.exists():
            convert(module, samples, kept, settings)
        shutil.copyfile(kept, file)

    return converted


def key(module: nn.Module, samples: Any, device: Any) -> str:
    """Of all that a graph is made of: layers and their settings, weights to the bit, inputs' shapes, the target."""
    shapes = {name: (tuple(value.shape), str(value.dtype)) for name, value in samples.items()}
    digest = hashlib.sha256(repr((shapes, device)).encode())
    for name, part in module.named_modules():
        plain = {key: value for key, value in vars(part).items() if _counts(key, value)}
        digest.update(f"{name} {type(part).__name__} {sorted(plain.items())} {part.extra_repr()}\n".encode())
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def _counts(key: str, value: Any) -> bool:
    return isinstance(value, _PLAIN) and key[0] != "_" and key not in _NOT_IN_THE_GRAPH
