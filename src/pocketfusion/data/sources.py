"""Any folder of captioned pictures: our packed arrays, webdataset shards, or picture + caption files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from pocketfusion.data.files import plain_text, read_bytes
from pocketfusion.data.packed import CaptionedImages, open_packed
from pocketfusion.data.pictures import PICTURES, UNREAD, read_picture
from pocketfusion.data.rows import MAX_CAPTION, TABLES, LeftOut, parse_row, read_table, same_name, split_of_path
from pocketfusion.data.shards import iter_shard
from pocketfusion.errors import PocketfusionError

_HELD_OUT = 0.05
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_TEXTS = ("readme", "license", "licence", "licenses", "notice", "copyright", "changelog")  #: .txt that are no captions
Sample = tuple[str, str | None, Image.Image, dict[str, Any]]  #: key, split that its path states, picture, row


def open_dataset(path: Path, size: int, *, skip_bad: bool = False) -> CaptionedImages:
    """Opens captioned pictures at `size` pixels; pictures of other sizes are cropped to a square and resized.

    - a folder with `dataset.json`: what `pocketfusion data` wrote;
    - a folder with `*.tar`: webdataset shards of picture + `.txt` (or `.json` with a `caption`) under one key;
    - a folder with pictures: the caption is in the `.txt` of the same name or in a `metadata.jsonl` or `metadata.csv`
      (`file_name`, `text`), as in the Hub's image folders; sub-folders are read too.

    A row of a table or a sample's `.json` may carry `split` and `flip`; `train/`, `validation/` and `test/` in paths
    state the split too. If no picture is of a validation split, a twentieth of those without a split (by hash of
    their names), and two at least if there are four, become `val_combo`.

    Raises PocketfusionError if nothing is found or a shard, picture or caption is damaged, missing or of a wrong kind;
    with `skip_bad` single samples are left out instead and counted in the result's name and notes.
    """
    if not path.is_dir():
        raise PocketfusionError(f"there is no data folder at {path}: build one with 'pocketfusion data emoji {path}'")
    if (path / "dataset.json").is_file():
        return open_packed(path, size)
    left_out = LeftOut(skip_bad)
    found = _Found(path, left_out)
    if found.shards and found.pictures:
        raise PocketfusionError(
            f"{path} holds shards ({found.shards[0]}) and pictures ({min(found.pictures)}): "
            "give each a folder of its own"
        )
    images, rows = [], []
    for key, split, picture, row in _iter_shards(found) if found.shards else _iter_files(found):
        images.append(square(picture, size))
        rows.append({"id": key, "split": split, "flip": False, **row})
    if not images:
        reason = f" ({len(left_out.found)} bad samples, first: {left_out.found[0]})" if left_out.found else ""
        raise PocketfusionError(f"{path} holds no dataset.json, no .tar shards and no pictures with captions{reason}")
    _hold_out(rows)
    digest = sha256()
    for image, row in zip(images, rows, strict=True):
        digest.update(json.dumps(row, sort_keys=True).encode() + image.tobytes())
    name = path.absolute().name.encode(errors="replace").decode()
    if left_out.found:
        name += f" ({len(left_out.found):,} bad samples left out)"
    notes = left_out.notes() + found.notes()
    return CaptionedImages(np.stack(images), rows, name, digest.hexdigest()[:32], notes=notes)


def square(picture: Image.Image, size: int) -> np.ndarray:
    """Centre crop and Lanczos resize of an RGB picture to uint8 [size, size, 3]."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=box))


def _hold_out(rows: list[dict[str, Any]]) -> None:
    """Gives the rows without a split theirs: all of them train if another row is of a validation split."""
    free = [row for row in rows if row["split"] is None]
    held = 0
    if not any(str(row["split"]).startswith("val") for row in rows):
        low = sum(_rank(row) / 16**8 < _HELD_OUT for row in free)
        held = min(max(low, 2), len(free) // 2)
    for number, row in enumerate(sorted(free, key=_rank)):
        row["split"] = "val_combo" if number < held else "train"


def _rank(row: dict[str, Any]) -> int:
    return int(sha256(row["id"].encode()).hexdigest()[:8], 16)


class _Found:
    """The files below a folder by kind; names that begin with `.` or `__` are passed over, as on the Hub."""

    def __init__(self, root: Path, left_out: LeftOut):
        self.root, self.left_out = root, left_out
        self.pictures: set[str] = set()  #: paths below the root, with /
        self.texts: dict[str, str] = {}  #: path without suffix → the `.txt`'s path
        self.shards: list[str] = []
        self.tables: list[str] = []
        self.others: set[str] = set()
        try:
            self._walk()
        except OSError as error:
            raise PocketfusionError(f"{error.filename} cannot be listed ({error.strerror})") from None
        self.shards.sort()
        self.tables.sort()

    def _walk(self) -> None:
        waiting, seen = [PurePosixPath()], set[tuple[int, int]]()
        while waiting:
            below = waiting.pop()
            folder = self.root / below
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link up would never end, one aside gives pictures twice
                self.left_out.tell(f"{folder} is a link to a folder that is read already: remove it")
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if not entry.name.startswith((".", "__")):
                    with self.left_out.or_raise():
                        waiting += self._look_at(entry, below / entry.name)

    def _look_at(self, entry: os.DirEntry[str], path: PurePosixPath) -> list[PurePosixPath]:
        """Sorts a file in; gives a folder back."""
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise PocketfusionError(f"{self.root} holds a name that is not UTF-8 ({str(path)!r}): rename it") from None
        if not entry.is_dir():
            self._sort_in(str(path))
            return []
        if path.suffix.lower() in (*PICTURES, ".txt", ".tar"):
            raise PocketfusionError(f"{self.root / path} is a folder with the name of a file: rename it")
        return [path]

    def _sort_in(self, name: str) -> None:
        path, suffix = PurePosixPath(name), PurePosixPath(name).suffix.lower()
        if path.name in TABLES:
            self.tables.append(name)
        elif path.name == "metadata.parquet":
            raise PocketfusionError(f"{self.root / name} is not read: write it as metadata.jsonl or metadata.csv")
        elif suffix in PICTURES:
            self.pictures.add(name)
        elif suffix == ".txt" and path.stem.lower() not in _TEXTS:
            self.texts[str(path.with_suffix(""))] = name
        elif suffix == ".tar":
            self.shards.append(name)
        elif name.lower().endswith(_COMPRESSED):
            raise PocketfusionError(f"{self.root / name} is a compressed shard: decompress it to .tar")
        else:
            self.others.add(name)

    def notes(self) -> list[str]:
        """Files that are of no use to us; a README is expected."""
        known = {PurePosixPath(name) for name in self.others}
        others = sorted(str(p) for p in known if p.stem.lower() not in _TEXTS and p.suffix.lower() not in UNREAD)
        first = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        return [f"{len(others):,} files of other types were not read ({first})."] if others else []


def _iter_shards(found: _Found) -> Iterator[Sample]:
    seen: set[str] = set()
    for name in found.shards:
        shard = PurePosixPath(name)
        for key, picture, row in iter_shard(found.root / name, found.left_out):
            split = split_of_path([*shard.with_suffix("").parts, *PurePosixPath(key).parts[:-1]])
            unique = key if key not in seen else f"{shard.with_suffix('')}/{key}"  # some count anew in each shard
            seen.add(unique)
            yield unique, split, picture, row


def _iter_files(found: _Found) -> Iterator[Sample]:
    root, left_out = found.root, found.left_out
    table: dict[str, dict[str, Any] | None] = {}
    for name in found.tables:
        for picture_name, entry in read_table(root / name, PurePosixPath(name).parent, left_out):
            if picture_name in table:
                left_out.tell(f"{root / name} lists {picture_name} twice, or another table does: keep one line of it")
            table[picture_name] = entry
    listed = {name for name in found.others if same_name(name) in table}  # of whatever name: the bytes decide
    pictures = sorted(found.pictures | listed)
    stems = [str(PurePosixPath(name).with_suffix("")) for name in pictures]
    times = Counter(stems)
    for name, stem in zip(pictures, stems, strict=True):
        if table.get(same_name(name), True) is None:
            continue  # its line was bad, and told
        row, text = table.get(same_name(name)), found.texts.get(stem)
        made = None
        with left_out.or_raise():
            if row is None and text is not None:
                caption = plain_text(read_bytes(root / text, MAX_CAPTION), str(root / text))
                row = parse_row({}, str(root / text), caption)
            if row is None:
                raise PocketfusionError(
                    f"{root / name} has no caption: write {PurePosixPath(stem).name}.txt beside it "
                    "or list it in metadata.jsonl"
                )
            made = read_picture(root / name)
        if made is not None and row is not None:
            key = stem if times[stem] == 1 else name
            yield key, split_of_path(PurePosixPath(name).parts[:-1]), made, row
    for name in sorted(set(table) - {same_name(name) for name in pictures}):
        left_out.tell(f"a table in {root} lists {name}, which is not there: remove the line or bring the picture")
    others = {str(PurePosixPath(name).with_suffix("")): name for name in sorted(found.others - listed)}
    for stem in sorted(set(found.texts) - set(stems)):
        reason = f"a type that is read: save {others[stem]} as PNG" if stem in others else "its name: remove it"
        left_out.tell(f"{root / found.texts[stem]} is a caption without a picture of {reason}")
    for stem, name in others.items():
        if PurePosixPath(name).suffix.lower() in UNREAD and stem not in found.texts:
            left_out.tell(f"{root / name} is a picture of a type that is not read: save it as PNG")
