"""The pictures of an evaluation, drawn into the store apart from scoring: resumable, and shared by processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import SamplerSettings, System
from pocketfusion.evaluate.images import CaptionedReference
from pocketfusion.evaluate.sets import picture_seed
from pocketfusion.evaluate.store import Shelf, Wanted


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
