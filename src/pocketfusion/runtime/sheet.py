"""Contact sheets: pictures in a grid, a caption under each."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

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
