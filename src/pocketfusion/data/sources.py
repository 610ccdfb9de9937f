"""Any folder of captioned pictures: our packed arrays, webdataset shards, or picture + caption files."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from pocketfusion.data.packed import CaptionedImages, open_packed
from pocketfusion.errors import PocketfusionError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def open_dataset(path: Path, size: int) -> CaptionedImages:
    """Opens captioned pictures at `size` pixels; pictures of other sizes are cropped to a square and resized.

    - a folder with `dataset.json`: what `pocketfusion data` wrote;
    - a folder with `*.tar`: webdataset shards of picture + `.txt` (or `.json` with a `caption`) under one key;
    - a folder with pictures: the caption is in the `.txt` of the same name or in `metadata.jsonl` (`file_name`,
      `text`).

    A row of `metadata.jsonl` or a sample's `.json` may carry `split`; without one, a twentieth is `val_combo` by hash
    of the picture's name. Raises PocketfusionError if nothing is found or a shard or picture is damaged.
    """
    if not path.is_dir():
        raise PocketfusionError(f"there is no data folder at {path}: build one with 'pocketfusion data emoji {path}'")
    if (path / "dataset.json").is_file():
        return open_packed(path, size)
    shards = sorted(path.glob("*.tar"))
    samples = _iter_shards(shards) if shards else _iter_files(path)
    images, rows, digest = [], [], sha256()
    for key, picture, row in samples:
        images.append(square(picture, size))
        split = "val_combo" if int(sha256(key.encode()).hexdigest()[:8], 16) / 16**8 < 0.05 else "train"
        rows.append({"id": key, "split": split, "flip": False, **row})
        digest.update(key.encode() + images[-1].tobytes())
    if not images:
        raise PocketfusionError(f"{path} holds no dataset.json, no .tar shards and no pictures with captions")
    return CaptionedImages(np.stack(images), rows, path.name, digest.hexdigest()[:32])


def square(picture: Image.Image, size: int) -> np.ndarray:
    """Centre crop and Lanczos resize to uint8 [size, size, 3]; transparency becomes white."""
    if picture.mode in ("RGBA", "LA", "P"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        picture = Image.alpha_composite(white, picture)
    picture = picture.convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=box))


def _decode(data: bytes, where: str) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return picture
    except Exception:
        raise PocketfusionError(f"{where} is not a readable picture: remove or replace it") from None


def _iter_shards(shards: list[Path]) -> Iterator[tuple[str, Image.Image, dict]]:
    import webdataset as wds

    for shard in shards:
        try:
            for sample in wds.WebDataset(str(shard), shardshuffle=False, handler=wds.reraise_exception):
                key = sample["__key__"]
                name = next((k for k in sample if f".{k}" in PICTURES), None)
                if name is None:
                    continue
                extra = json.loads(sample["json"]) if "json" in sample else {}
                text = sample["txt"].decode() if "txt" in sample else extra.get("caption")
                if text is None:
                    raise PocketfusionError(f"{shard}: sample '{key}' has no caption (.txt, or .json with 'caption')")
                row = {"captions": [text.strip()], **{k: extra[k] for k in ("split", "flip") if k in extra}}
                yield key, _decode(sample[name], f"{shard}: sample '{key}'"), row
        except PocketfusionError:
            raise
        except Exception as error:
            raise PocketfusionError(f"the shard {shard} is damaged ({error}): fetch or build it again") from None


def _iter_files(path: Path) -> Iterator[tuple[str, Image.Image, dict]]:
    table: dict[str, dict] = {}
    if (path / "metadata.jsonl").is_file():
        for number, line in enumerate((path / "metadata.jsonl").read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                row = {k: entry[k] for k in ("split", "flip") if k in entry}
                table[entry["file_name"]] = {"captions": [entry["text"]], **row}
            except (ValueError, KeyError, TypeError):
                raise PocketfusionError(
                    f"{path / 'metadata.jsonl'} line {number} is not JSON with 'file_name' and 'text'"
                ) from None
    for file in sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES):
        caption = file.with_suffix(".txt")
        if file.name in table:
            row = table[file.name]
        elif caption.is_file():
            row = {"captions": [caption.read_text(encoding="utf-8").strip()]}
        else:
            raise PocketfusionError(
                f"{file} has no caption: write {caption.name} beside it or list it in metadata.jsonl"
            )
        yield file.stem, _decode(file.read_bytes(), str(file)), row
