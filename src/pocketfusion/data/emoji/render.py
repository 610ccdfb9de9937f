"""Drawings to pixels: SVG by resvg, WebP by Pillow, always composited on a plain background."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

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
