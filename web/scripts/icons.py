"""Draws the page's icons with the embedded model: python web/scripts/icons.py"""

from pathlib import Path

from PIL import Image

import pocketfusion

PROMPT, SEED = "heart, fluent 3d style", 4
PUBLIC = Path(__file__).parents[1] / "public"


def icon(picture: Image.Image, side: int, share: float) -> Image.Image:
    """The picture on white, `share` of the icon's side large; in 256 colours."""
    picture = picture.crop((3, 3, 61, 61))  # specks in the corners
    inner = round(side * share)
    large = picture.resize((inner, inner), Image.Resampling.LANCZOS)
    large = large.point(lambda value: 255 if value > 244 else value)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(large, ((side - inner) // 2,) * 2)
    return canvas.quantize(256)


drawn = pocketfusion.load().generate(PROMPT, seed=SEED).images[0]
for name, side, share in (("icon-192", 192, 0.96), ("icon-512", 512, 0.96), ("icon-maskable", 512, 0.7)):
    icon(drawn, side, share).save(PUBLIC / f"{name}.png", optimize=True)
