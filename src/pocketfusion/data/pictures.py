"""The one door through which pictures come in: bytes of a known type → an upright RGB picture, or one sentence."""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pocketfusion.data.files import MAX_BYTES, open_file, read_bytes
from pocketfusion.errors import PocketfusionError

PICTURES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
#: names of pictures that are not read: each is named rather than passed over
UNREAD = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".tga", ".ico", ".dng", ".cr2", ".nef", ".arw")
MAX_PIXELS = 128_000_000  #: told by the header, before anything is decoded
# nothing else is tried: Pillow would start Ghostscript for PostScript, whatever the file's name
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_MAX_SCANS = 1000  # a progressive JPEG has about ten; each costs a pass over the whole picture for a few bytes
_ORIENTATION = 0x0112  # EXIF's tag: the transposition that turns the stored picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# what is wrong with a picture is told in our sentence, and not also by Pillow
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def open_picture(data: bytes, where: str) -> Image.Image:
    """Decodes PNG, JPEG, WebP, GIF, BMP or TIFF to mode RGB: turned upright by its EXIF tag, on white where it is
    transparent, 16-bit grey scaled to 8 bits, the first picture of several. Colour profiles are not applied.

    Raises PocketfusionError, beginning with `where`, for another type, more than `MAX_PIXELS`, 32-bit grey or damage.
    """
    too_large = PocketfusionError(f"{where} is too large (over {MAX_PIXELS // 10**6} million pixels): make it smaller")
    try:
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise too_large
        if picture.format == "JPEG" and data.count(b"\xff\xda") > _MAX_SCANS + len(data) // 10_000:
            raise PocketfusionError(f"{where} is a JPEG of thousands of scans: save it again")
        picture.load()
        turn = _UPRIGHT.get(_orientation(picture))
        made = _rgb(picture, data, where)
        return made.transpose(turn) if turn is not None else made
    except PocketfusionError:
        raise
    except Image.DecompressionBombError:
        raise too_large from None
    except UnidentifiedImageError:
        reason = "it is no PNG, JPEG, WebP, GIF, BMP or TIFF"
    except Exception as error:  # decoders raise many kinds, also SyntaxError and struct.error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
    raise PocketfusionError(f"{where} is not a readable picture ({reason}): remove or replace it")


def read_picture(file: Path) -> Image.Image:
    """`open_picture` of a regular file; raises PocketfusionError naming it if it is none or cannot be decoded."""
    return open_picture(read_bytes(file), str(file))


@dataclass(frozen=True)
class Stored:
    """Where a picture's bytes lie: in a file of its own, or at `offset` in an archive, `size` of them."""

    file: Path
    where: str  #: how a sentence names it
    offset: int | None = None
    size: int = 0

    def open(self) -> Image.Image:
        """`open_picture` of these bytes; raises PocketfusionError naming them if they cannot be read or decoded."""
        if self.offset is None:
            return read_picture(self.file)
        if not 0 <= self.size <= MAX_BYTES:
            raise PocketfusionError(
                f"{self.where} is too large ({MAX_BYTES >> 20} MiB is the most that is read of it)"
            )
        with open_file(self.file) as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise PocketfusionError(f"{self.where} is cut short: build the shard again")
        return open_picture(data, self.where)


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION)
    except Exception:  # a damaged EXIF block says nothing; the picture itself is whole
        return 1
    return value if isinstance(value, int) else 1


def _rgb(picture: Image.Image, data: bytes, where: str) -> Image.Image:
    mode, key = picture.mode, picture.info.get("transparency")
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PNG"):  # 16-bit grey: Pillow would clip it
        values = np.asarray(picture).astype(np.int64)
        grey = (values * 255 + 32767) // 65535
        if isinstance(key, int):
            grey[values == key] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise PocketfusionError(f"{where} has 32-bit grey values of unknown range: save it with 8 or 16 bits")
    if mode in ("L", "RGB") and key is not None:  # a colour key
        pixels = np.array(picture)
        keys = np.atleast_1d(np.asarray(key))
        if picture.format == "PNG":  # the key has the file's depth (IHDR's byte), the pixels have 8 bits
            depth = data[24]
            keys = keys >> 8 if depth == 16 else (keys & ((1 << depth) - 1)) * 255 // ((1 << depth) - 1)
        matches = pixels == (keys if mode == "RGB" else keys[0])
        pixels[matches.all(-1) if mode == "RGB" else matches] = 255
        return Image.fromarray(pixels).convert("RGB")
    if mode in ("RGBA", "LA", "P", "PA", "La", "RGBa") or key is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")
