"""Composed scenes: drawings on a plain coloured background with captions whose truth can be checked.

Three kinds: `background` (one drawing), `count` (two or three of the same) and `relation` (two drawings, left of or
above). They use training pairs only; a tenth, chosen by hash over what is shown, is held out as `test_scene`.
Drawings become pixels by resvg (SVG) or Pillow (WebP), always on a plain background.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from pocketfusion.data.emoji.concepts import Drawing, may_flip, with_article
from pocketfusion.data.emoji.drawings import STYLES
from pocketfusion.errors import INSTALL_COMPRESS, PocketfusionError

WHITE = (255, 255, 255)


def render_rgba(source: str | Path, size: int) -> Image.Image:
    """One drawing as `size`×`size` RGBA; `source` is SVG text or the path of a raster file.

    Raises PocketfusionError if resvg or Pillow cannot read it.
    """
    try:
        if isinstance(source, Path):
            with Image.open(source) as picture:
                return picture.convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)
        import resvg_py

        png = resvg_py.svg_to_bytes(svg_string=source, width=size, height=size, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    except ImportError:
        raise PocketfusionError(f"resvg-py is missing: {INSTALL_COMPRESS}") from None
    except Exception as error:
        raise PocketfusionError(f"a drawing could not be rendered ({error}): the package may be damaged") from None


def place(canvas: Image.Image, source: str | Path, size: int, centre: tuple[float, float], flip: bool = False) -> None:
    """Draws `source` at `size` pixels onto `canvas`, centred at `centre` (pixels), mirrored if `flip`.

    The drawing is rendered at its final size, so scaling never resamples pixels.
    """
    picture = render_rgba(source, size)
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = round(centre[0] - size / 2), round(centre[1] - size / 2)
    canvas.alpha_composite(picture, (max(left, 0), max(top, 0)), (max(-left, 0), max(-top, 0)))


def render_on(
    source: str | Path,
    size: int,
    *,
    scale: float = 1.0,
    offset: tuple[float, float] = (0.0, 0.0),
    flip: bool = False,
    background: Sequence[int] = WHITE,
) -> np.ndarray:
    """One drawing on a plain background as uint8 [size, size, 3]; `offset` is a share of `size`."""
    canvas = Image.new("RGBA", (size, size), (*background, 255))
    centre = (size * (0.5 + offset[0]), size * (0.5 + offset[1]))
    place(canvas, source, max(1, round(size * scale)), centre, flip)
    return np.asarray(canvas.convert("RGB"))


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
