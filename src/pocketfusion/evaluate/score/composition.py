"""Is a composed scene what its caption says? Plain image arithmetic, and the judge only for which drawing is which.

How well this reads real scenes is measured with it and printed beside the generated ones: see docs/judge.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from pocketfusion.data.emoji.scenes import BACKGROUNDS, Scene

# Chosen on train_scene pictures, clean and with blur and noise added; the shares are of the picture's side.
_FOREGROUND = 32  #: a pixel is foreground if one channel is further than this from the background
_GAP = 2 / 64  #: drawings are told apart by an empty row or column band at least this wide
SMALLEST = 0.2  #: a part whose longer side is below this is a loose piece of a drawing, not a drawing
_CROP = 0.525  #: side of the square shown to the judge: a drawing of 0.42 fills it as one of 0.8 fills a picture

_Box = tuple[int, int, int, int]  # top, bottom, left, right


class Scorer(Protocol):
    """The part of the judge that is needed here and in `harness`."""

    def image_features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] → (features [N, F], unit embeddings [N, E])."""

    def text_embeddings(self, captions: Sequence[str]) -> np.ndarray:
        """Captions → unit embeddings [N, E]."""


@dataclass(frozen=True)
class Reading:
    """What was found on a picture: its background by name, and a box (pixels) for each drawing."""

    background: str
    colour: np.ndarray  #: the border's median, [3]
    boxes: tuple[_Box, ...]


def border_colour(image: np.ndarray) -> np.ndarray:
    """Median colour of the two outermost pixels all around, [3]."""
    edge = np.concatenate([image[:2], image[-2:]]).reshape(-1, 3)
    sides = np.concatenate([image[2:-2, :2], image[2:-2, -2:]], axis=1).reshape(-1, 3)
    return np.median(np.concatenate([edge, sides]), axis=0)


def _foreground(image: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Pixels unlike the background, bool [H, W]; a 3×3 majority vote drops specks and hairlines."""
    mask = np.abs(image.astype(np.float32) - colour).max(axis=-1) > _FOREGROUND
    padded = np.pad(mask, 1).astype(np.uint8)
    height, width = mask.shape
    votes = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    return np.asarray(votes) >= 5


def _runs(occupied: np.ndarray) -> np.ndarray:
    """Begin and end of each run of True, [R, 2]."""
    return np.flatnonzero(np.diff(np.concatenate([[0], occupied.astype(np.int8), [0]]))).reshape(-1, 2)


def cut(mask: np.ndarray, gap: int) -> list[_Box]:
    """Recursive XY cut (Nagy & Seth 1984): splits at the widest empty row or column band of at least `gap` pixels.

    Unlike connected components it does not count the loose pieces of one drawing unless a whole band parts them.
    """
    boxes: list[_Box] = []

    def divide(top: int, bottom: int, left: int, right: int) -> None:
        part = mask[top:bottom, left:right]
        rows, columns = _runs(np.asarray(part.any(axis=1))), _runs(np.asarray(part.any(axis=0)))
        if not len(rows):
            return
        bands = [(b[0] - a[1], 0, a[1], b[0]) for a, b in zip(rows, rows[1:], strict=False)]
        bands += [(b[0] - a[1], 1, a[1], b[0]) for a, b in zip(columns, columns[1:], strict=False)]
        width, axis, begin, end = max(bands, key=lambda band: band[0], default=(0, 0, 0, 0))
        if width < gap:
            boxes.append((top + rows[0][0], top + rows[-1][1], left + columns[0][0], left + columns[-1][1]))
        elif axis == 0:
            divide(top, top + begin, left, right)
            divide(top + end, bottom, left, right)
        else:
            divide(top, bottom, left, left + begin)
            divide(top, bottom, left + end, right)

    divide(0, mask.shape[0], 0, mask.shape[1])
    return boxes


def read_scene(image: np.ndarray) -> Reading:
    """Background and drawings of one picture, uint8 [H, W, 3]."""
    colour = border_colour(image)
    names, values = list(BACKGROUNDS), np.array(list(BACKGROUNDS.values()))
    name = names[int(np.argmin(((values - colour) ** 2).sum(axis=1)))]
    size = image.shape[0]
    parts = cut(_foreground(image, colour), max(1, round(_GAP * size)))
    boxes = tuple(b for b in parts if max(b[1] - b[0], b[3] - b[2]) >= SMALLEST * size)
    return Reading(name, colour, boxes)


def _in_order(reading: Reading, relation: str) -> tuple[_Box, _Box] | None:
    """The two drawings as (left, right) or (upper, lower); None if there are not two, or they lie the other way."""
    if len(reading.boxes) != 2:
        return None
    a, b = reading.boxes
    dy, dx = (b[0] + b[1]) - (a[0] + a[1]), (b[2] + b[3]) - (a[2] + a[3])
    if (abs(dx) > abs(dy)) != (relation == "left of"):
        return None
    return (a, b) if (dx if relation == "left of" else dy) > 0 else (b, a)


def crop(image: np.ndarray, box: _Box, colour: np.ndarray) -> np.ndarray:
    """One drawing alone on its background, as large as on a picture of its own: uint8 [H, W, 3]."""
    size = image.shape[0]
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    side = max(round(_CROP * size), height, width)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = np.round(colour)
    y, x = (side - height) // 2, (side - width) // 2
    canvas[y : y + height, x : x + width] = image[top:bottom, left:right]
    return np.asarray(Image.fromarray(canvas).resize((size, size), Image.Resampling.LANCZOS))


def check_scenes(images: np.ndarray, scenes: Sequence[dict], judge: Scorer) -> dict[str, np.ndarray]:
    """Whether pictures uint8 [N, H, W, 3] show what `scenes` (the rows' `scene`) say.

    `background` and `number` are [N]. Over the R relation scenes alone, [R]: `layout`, two drawings lie side by side
    or one above the other as said, and `relation`, of these the judge also finds each label where it should be (the
    captions of the two crops fit better in this order than in the other; guessing would find half of the layouts).
    """
    readings = [read_scene(image) for image in images]
    background = [reading.background == scene["background"] for reading, scene in zip(readings, scenes, strict=True)]
    number = [len(reading.boxes) == len(scene["labels"]) for reading, scene in zip(readings, scenes, strict=True)]
    pairs = [
        (image, reading, scene, _in_order(reading, scene["relation"]))
        for image, reading, scene in zip(images, readings, scenes, strict=True)
        if scene["kind"] == "relation"
    ]
    layout = np.array([boxes is not None for *_, boxes in pairs], dtype=bool)
    relation = layout.copy()
    found = [(image, reading, scene, boxes) for image, reading, scene, boxes in pairs if boxes is not None]
    if found:
        crops = np.stack([crop(image, box, r.colour) for image, r, _, boxes in found for box in boxes])
        captions = [
            Scene("background", scene["style"], reading.background, (label,)).caption
            for _, reading, scene, _ in found
            for label in scene["labels"]
        ]
        pictures = judge.image_features(crops)[1].reshape(len(found), 2, -1)
        texts = judge.text_embeddings(captions).reshape(len(found), 2, -1)
        fit = pictures @ texts.transpose(0, 2, 1)  # [found, crop, label]
        relation[layout] = fit[:, 0, 0] + fit[:, 1, 1] > fit[:, 0, 1] + fit[:, 1, 0]
    return {
        "background": np.array(background, dtype=bool),
        "number": np.array(number, dtype=bool),
        "layout": layout,
        "relation": relation,
    }
