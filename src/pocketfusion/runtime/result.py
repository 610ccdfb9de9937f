"""What a generation gives back: pictures, how they came to be, where the time went, and several on a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

from pocketfusion.runtime.specs import SamplerName


class Cancelled(Exception):
    """Raised by `Pipeline.generate` when its callback asked to stop; a callback may raise it too."""


@dataclass
class Timings:
    """Seconds. `load` is the pipeline's (verify, load, pack); `steps` has one entry per step of every picture.

    What `text`, `steps` and `decode` leave of `total` are callbacks and, in the modes that load while they draw,
    waiting for networks to be loaded and freed.
    """

    load: float
    text: float = 0.0
    steps: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    total: float = 0.0  #: of this call, without `load`


@dataclass(repr=False)
class GenerationResult:
    """Pictures and how they came to be; `seeds[i]` draws `images[i]` again with the same settings."""

    images: list[Image.Image]
    prompt: str
    negative_prompt: str
    seeds: list[int]
    num_inference_steps: int
    guidance_scale: float
    timings: Timings
    peak_rss: int | None  #: bytes, of the whole process so far; None where the system does not tell
    warnings: list[str]
    sampler: SamplerName
    eta: float | None = None  #: TCD's share of fresh noise; None with other samplers

    def __repr__(self) -> str:
        size, steps = "×".join(map(str, self.images[0].size)), self.num_inference_steps
        return (
            f"<GenerationResult: {len(self.images)} of {self.prompt!r}, {size} px, {steps} steps of {self.sampler}, "
            f"guidance {self.guidance_scale:g}, seeds {_span(self.seeds)}, {self.timings.total:.2f} s>"
        )

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the picture, or all of them on a sheet."""
        file = BytesIO()
        captions = [f"seed {seed}" for seed in self.seeds] or None
        shown = self.images[0] if len(self.images) == 1 else contact_sheet(self.images, captions)
        shown.save(file, format="PNG")
        return file.getvalue()


def _span(seeds: list[int]) -> str:
    return "of the latents given" if not seeds else f"{seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else "")


_PADDING = 8
_FONT_SIZE = 12
_MAX_LINES = 3
_MIN_CELL = 128
_INK, _PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, *, columns: int | None = None
) -> Image.Image:
    """An RGB picture of `images` in rows of `columns` (by default about a square), `captions` below them.

    Pictures smaller than 128 px are enlarged by a whole factor, pixels kept sharp. Captions wrap at three lines; a
    caption in a script that Pillow's built-in font lacks shows boxes. Raises ValueError if there are no images or as
    many captions as images are not given.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one image")
    captions = captions if captions is not None else [""] * len(images)
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    columns = min(len(images), columns or round(len(images) ** 0.5 + 0.49))
    rows = -(-len(images) // columns)
    largest = max(max(image.size) for image in images)
    factor = max(1, _MIN_CELL // largest)
    cell = largest * factor
    font = ImageFont.load_default(_FONT_SIZE)
    wrapped = [_wrap(caption, cell, font) for caption in captions]
    line = _FONT_SIZE + 3
    text_height = line * max(len(lines) for lines in wrapped)
    width, height = cell + _PADDING, cell + _PADDING + (text_height + 2 if text_height else 0)
    sheet = Image.new("RGB", (columns * width + _PADDING, rows * height + _PADDING), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = _PADDING + i % columns * width, _PADDING + i // columns * height
        enlarged = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (x, y))
        for k, text in enumerate(lines):
            draw.text((x, y + cell + 2 + k * line), text, font=font, fill=_INK)
    return sheet


def _wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """`text` in at most three lines of `width` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    words = text.encode("utf-8", "replace").decode()[:400].split()  # 400: more never fits, and measuring is slow
    for word in words:
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    cut = len(lines) > _MAX_LINES
    lines = lines[:_MAX_LINES]
    for i, text in enumerate(lines):
        ellipsis = "…" if cut and i == _MAX_LINES - 1 else ""
        while text and font.getlength(text + ellipsis) > width:
            text, ellipsis = text[:-1], "…"
        lines[i] = text + ellipsis
    return lines
