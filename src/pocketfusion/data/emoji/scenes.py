"""Composed scenes: drawings on a plain coloured background with captions whose truth can be checked.

Three kinds: `background` (one drawing), `count` (two or three of the same) and `relation` (two drawings, left of or
above). They use training pairs only; a tenth, chosen by hash over what is shown, is held out as `test_scene`.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from hashlib import sha256

import numpy as np
from PIL import Image

from pocketfusion.data.emoji.captions import may_flip, with_article
from pocketfusion.data.emoji.concepts import Drawing
from pocketfusion.data.emoji.packages import STYLES
from pocketfusion.data.emoji.render import place

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (220, 60, 60),
    "orange": (245, 160, 60),
    "yellow": (250, 225, 90),
    "green": (110, 190, 110),
    "blue": (90, 140, 225),
    "purple": (160, 110, 200),
    "pink": (245, 165, 200),
    "grey": (150, 150, 150),
}
NUMBER_WORDS = {2: "two", 3: "three"}
KINDS = ("background", "count", "relation")


@dataclass(frozen=True)
class Scene:
    """What a scene shows: enough to check a picture against its caption."""

    kind: str
    style: str
    background: str
    labels: tuple[str, ...]
    relation: str | None = None  #: "left of" or "above": labels[0] is left of / above labels[1]

    @property
    def number(self) -> int:
        """How many drawings are on the picture."""
        return len(self.labels)

    @property
    def caption(self) -> str:
        """The sentence that says all of it."""
        if self.kind == "relation":
            shown = f"{with_article(self.labels[0])} {self.relation} {with_article(self.labels[1])}"
        elif self.kind == "count":
            shown = f"{NUMBER_WORDS[self.number]} of {self.labels[0]}"
        else:
            shown = with_article(self.labels[0])
        return f"{shown} on a {self.background} background, {STYLES[self.style].words} style"

    @property
    def split(self) -> str:
        """`test_scene` for a tenth of all captions, by hash; `train_scene` for the rest."""
        digest = int(sha256(f"scene-split-v1|{self.caption}".encode()).hexdigest()[:16], 16)
        return "test_scene" if digest / 16**16 < 0.10 else "train_scene"

    def as_dict(self) -> dict:
        """The scene as JSON values."""
        return {**asdict(self), "labels": list(self.labels)}


def sample_scene(drawings: list[Drawing], rng: random.Random) -> tuple[Scene, list[Drawing]]:
    """Draws one scene from `drawings` (of one style) with `rng`; returns it and its drawings in placing order."""
    kind = rng.choice(KINDS)
    if kind == "relation":
        shown = rng.sample(drawings, 2)
    else:
        shown = [rng.choice(drawings)] * (rng.choice((2, 3)) if kind == "count" else 1)
    background = rng.choice([name for name in BACKGROUNDS if name != "white" or kind != "background"])
    scene = Scene(
        kind=kind,
        style=shown[0].style,
        background=background,
        labels=tuple(drawing.concept.label.replace(": ", ", ") for drawing in shown),
        relation=rng.choice(("left of", "above")) if kind == "relation" else None,
    )
    return scene, shown


def scene_may_flip(scene: Scene, shown: list[Drawing]) -> bool:
    """Whether the mirrored scene still fits its caption: no sides are named and every drawing may be mirrored."""
    return scene.relation != "left of" and all(may_flip(drawing.concept) for drawing in shown)


def render_scene(scene: Scene, shown: list[Drawing], size: int) -> np.ndarray:
    """The scene as uint8 [size, size, 3]; drawings never touch one another or the border."""
    canvas = Image.new("RGBA", (size, size), (*BACKGROUNDS[scene.background], 255))
    centres = {
        1: [(0.5, 0.5)],
        2: [(0.5, 0.27), (0.5, 0.73)] if scene.relation == "above" else [(0.27, 0.5), (0.73, 0.5)],
        3: [(0.27, 0.27), (0.73, 0.27), (0.5, 0.73)],
    }[scene.number]
    share = 0.8 if scene.number == 1 else 0.42
    for drawing, (x, y) in zip(shown, centres, strict=True):
        place(canvas, drawing.source, round(size * share), (x * size, y * size))
    return np.asarray(canvas.convert("RGB"))
