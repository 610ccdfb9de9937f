"""Drawn pictures on disk, one file each under a name made of all that it depends on: runs share and resume them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from pocketfusion.artefact import atomic_file, write_json
from pocketfusion.data.pictures import read_picture
from pocketfusion.errors import PocketfusionError

DRAWN_WITH = "drawn_with.json"


class Wanted(NamedTuple):
    """One picture to draw: its prompt and the seed of its noise."""

    prompt: str
    seed: int


class Shelf:
    """The pictures of one system at one guidance scale: PNG files of `size` pixels a side."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def file(self, wanted: Wanted) -> Path:
        """Where the picture is or will be. It depends on prompt and seed alone: not on its set, place or batch."""
        digest = sha256(f"{wanted.seed}|{wanted.prompt}".encode()).hexdigest()
        return self.folder / f"{digest[:20]}.png"

    def get(self, wanted: Wanted) -> np.ndarray | None:
        """uint8 [size, size, 3], or None if the picture is not there, damaged or of another size."""
        try:
            image = np.asarray(read_picture(self.file(wanted)))
        except PocketfusionError:
            return None
        return image if image.shape == (self.size, self.size, 3) else None

    def put(self, wanted: Wanted, image: np.ndarray) -> None:
        """Keeps a picture (atomically), prompt and seed in its text chunks."""
        text = PngImagePlugin.PngInfo()
        text.add_itxt("prompt", wanted.prompt)
        text.add_text("seed", str(wanted.seed))
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file(wanted), durable=False) as partial:  # a damaged one is drawn again
            Image.fromarray(image).save(partial, pnginfo=text, compress_level=4)

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """Those that have to be drawn, each once."""
        return [one for one in dict.fromkeys(wanted) if self.get(one) is None]


class PictureStore:
    """Shelves in a folder: NAME-<hash of what the pictures are drawn with>/g<guidance scale>/<picture>.png."""

    def __init__(self, folder: Path):
        self.folder = folder

    def shelf(self, name: str, drawn_with: Mapping[str, Any], guidance_scale: float, size: int) -> Shelf:
        """The shelf of a system. `name` is for readers; an existing shelf is found whatever it was called."""
        digest = sha256(json.dumps(dict(drawn_with), sort_keys=True).encode()).hexdigest()[:12]
        existing = sorted(self.folder.glob(f"*-{digest}"))
        folder = existing[0] if existing else self.folder / f"{name}-{digest}"
        if not (folder / DRAWN_WITH).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / DRAWN_WITH, dict(drawn_with))
        return Shelf(folder / f"g{float(guidance_scale)!r}", size)
