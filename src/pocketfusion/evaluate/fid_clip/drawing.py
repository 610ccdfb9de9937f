"""The pictures of an evaluation, drawn into a store apart from scoring: resumable, and shared by processes and runs.

Each is a file under a name made of all that it depends on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from pocketfusion.artefact import atomic_file, write_json
from pocketfusion.data.pictures import read_picture
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import SamplerSettings, System
from pocketfusion.evaluate.reference import CaptionedReference
from pocketfusion.evaluate.sets import picture_seed

_DRAWN_WITH = "drawn_with.json"


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
        if not (folder / _DRAWN_WITH).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _DRAWN_WITH, dict(drawn_with))
        return Shelf(folder / f"g{float(guidance_scale)!r}", size)


@dataclass(frozen=True)
class Plan:
    """What every system draws at every guidance scale."""

    pictures: tuple[Wanted, ...]  #: one a caption, in the reference's order
    again: tuple[tuple[Wanted, ...], ...]  #: for diversity: pictures of one prompt that differ in their noise

    @classmethod
    def of(cls, reference: CaptionedReference, seed: int, prompts: int, images: int) -> Plan:
        """A picture of every caption and, of the first `prompts` different ones, `images` each (their first included).

        Noise follows from `seed` and the caption's id; a further picture's from its number too.
        """
        pictures = tuple(
            Wanted(caption, picture_seed(seed, key))
            for key, caption in zip(reference.ids, reference.captions, strict=True)
        )
        first = {one.prompt: place for place, one in reversed(list(enumerate(pictures)))}
        again = [
            tuple(
                Wanted(pictures[place].prompt, picture_seed(seed, f"{reference.ids[place]}|{number}"))
                if number
                else pictures[place]
                for number in range(images)
            )
            for place in sorted(first.values())[:prompts]
        ]
        return cls(pictures, tuple(again))

    def everything(self) -> list[Wanted]:
        """All pictures, each once."""
        return list(dict.fromkeys([*self.pictures, *(one for row in self.again for one in row)]))


def draw_missing(
    open_system: Callable[[], System],
    shelf: Shelf,
    wanted: Sequence[Wanted],
    settings: SamplerSettings,
    on_done: Callable[[int], None] = lambda count: None,
) -> None:
    """Draws what the shelf lacks of `wanted`; `on_done` hears how many more are there.

    The system is opened only if something is missing. Pictures go to disk after each batch: a stop loses one at most.
    """
    missing = shelf.missing(wanted)
    on_done(len(wanted) - len(missing))
    if not missing:
        return
    system = open_system()
    for start in range(0, len(missing), system.batch):
        part = missing[start : start + system.batch]
        images = system.draw([one.prompt for one in part], [one.seed for one in part], settings)
        for one, image in zip(part, images, strict=True):
            shelf.put(one, image)
        on_done(len(part))


def load(shelf: Shelf, wanted: Sequence[Wanted], what: str) -> np.ndarray:
    """Pictures of the shelf, uint8 [N, H, W, 3]; raises PocketfusionError, naming `what`, if one is not there."""
    images: list[Any] = [shelf.get(one) for one in wanted]
    absent = [one for one, image in zip(wanted, images, strict=True) if image is None]
    if absent:
        raise PocketfusionError(
            f"{what}: {len(absent)} of {len(wanted)} pictures are not in {shelf.folder} after drawing: give all "
            "processes the same --store on one file system, and run the command again to draw them"
        )
    return np.stack(images)
