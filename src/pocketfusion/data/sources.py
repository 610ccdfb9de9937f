"""Any folder of captioned pictures: our packed arrays, webdataset shards, or picture + caption files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from pocketfusion.data.buckets import fit
from pocketfusion.data.decoding import LazyPictures, decoded
from pocketfusion.data.files import plain_text, read_bytes
from pocketfusion.data.found import Found
from pocketfusion.data.latents.reading import is_cache, open_cache
from pocketfusion.data.packed import CaptionedImages, open_packed
from pocketfusion.data.pictures import UNREAD, Stored
from pocketfusion.data.remote import SCHEMES, RemoteSource, is_url
from pocketfusion.data.rows import (
    MAX_CAPTION,
    LeftOut,
    Part,
    Sample,
    Source,
    hold_out,
    parse_row,
    rank,
    read_table,
    said,
    same_name,
    split_of_path,
    told_of,
)
from pocketfusion.data.shards import shard_samples
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import LicenceNote

_CHUNK = 1000  #: pictures of a part, where they are not in shards


def open_dataset(path: Path, size: int, *, skip_bad: bool = False) -> CaptionedImages:
    """Opens captioned pictures at `size` pixels; pictures of other sizes are cropped to a square and resized.

    - a folder with `dataset.json`: what `pocketfusion data` wrote;
    - a folder with `*.tar`: webdataset shards of picture + `.txt` (or `.json` with a `caption`) under one key;
    - a folder with pictures: the caption is in the `.txt` of the same name or in a `metadata.jsonl` or `metadata.csv`
      (`file_name`, `text`), as in the Hub's image folders; sub-folders are read too.

    A row of a table or a sample's `.json` may carry `split` and `flip`; `train/`, `validation/` and `test/` in paths
    state the split too; `hold_out` gives the others theirs. Every picture is decoded once to see that it is sound, and
    again whenever it is asked for: none stays in memory.

    Raises PocketfusionError if nothing is found or a shard, picture or caption is damaged, missing or of a wrong kind;
    with `skip_bad` single samples are left out instead and counted in the result's name and notes.
    """
    if is_cache(path):
        raise open_cache(path).no_pictures()
    if (path / "dataset.json").is_file():
        return open_packed(path, size)
    left_out = LeftOut(skip_bad)
    source = open_source(path, left_out)
    places, rows, digest, keys = list[Any](), list[dict[str, Any]](), sha256(), Counter[str]()
    for number in range(len(source.parts)):
        with source.reading(number, left_out) as samples:
            for sample, pixels in decoded(samples, lambda picture: fit(picture, size, size), left_out):
                places.append(sample.picture)
                rows.append(sample.row)
                digest.update(said(sample.row, sha256(pixels.tobytes()).hexdigest()))
                keys[sample.key] += 1
    if not rows:
        reason = f" ({len(left_out.found)} bad samples, first: {left_out.found[0]})" if left_out.found else ""
        raise PocketfusionError(f"{path} holds no dataset.json, no .tar shards and no pictures with captions{reason}")
    splits = [row["split"] for row in rows]
    validated = any(split is not None and split.startswith("val") for split in splits)
    ranks, free = np.array([rank(row["id"]) for row in rows]), np.array([split is None for split in splits])
    for row, held in zip(rows, hold_out(ranks, free, validated), strict=True):
        row["split"] = row["split"] or ("val_combo" if held else "train")
    name, notes = told_of(source.name, source.notes, left_out.found, sum(count - 1 for count in keys.values()))
    return CaptionedImages(LazyPictures(places, size), rows, name, digest.hexdigest()[:32], notes=notes)


def open_training_data(path: Path, size: int, *, skip_bad: bool = False) -> CaptionedImages:
    """`open_dataset` for training that needs latents alone: takes a cache of latents too.

    Raises PocketfusionError as `open_dataset` does, or if the cache is damaged or of another size.
    """
    if not is_cache(path):
        return open_dataset(path, size, skip_bad=skip_bad)
    cache = open_cache(path)
    cache.check_size(size)
    return cache


def any_source(data: str, size: int, left_out: LeftOut, scratch: Path) -> Source:
    """What `data cache` reads: a folder, packed at `size` or not, or a URL of shards, which come by `scratch`.

    Raises PocketfusionError if it is neither.
    """
    if is_url(data):
        return RemoteSource(data, left_out, scratch)
    path = Path(data)
    if is_cache(path):
        raise PocketfusionError(f"{path} is a cache of latents already: give the pictures")
    if (path / "dataset.json").is_file():
        return PicturesSource(open_packed(path, size))
    return open_source(path, left_out)


def open_source(path: Path, left_out: LeftOut) -> FolderSource:
    """A folder of shards or of picture files; raises PocketfusionError if it is neither, or both."""
    if path.parts and path.parts[0] in {f"{scheme}:" for scheme in SCHEMES}:
        raise PocketfusionError(f"{path} is no folder: of a URL make a cache first, with 'pocketfusion data cache'")
    if not path.is_dir():
        raise PocketfusionError(f"there is no data folder at {path}: build one with 'pocketfusion data emoji {path}'")
    found = Found(path, left_out)
    if found.shards and found.pictures:
        raise PocketfusionError(
            f"{path} holds shards ({found.shards[0]}) and pictures ({min(found.pictures)}): "
            "give each a folder of its own"
        )
    return ShardSource(found) if found.shards else FileSource(found)


class PicturesSource:
    """Pictures that are open already (`CaptionedImages`), in their order."""

    left_out: Sequence[str] = ()

    def __init__(self, data: CaptionedImages):
        self.data, self.name, self.fingerprint = data, data.name, data.fingerprint
        self.licences, self.notes = data.licences, data.notes
        starts = range(0, len(data), _CHUNK)
        self.parts = [Part(f"pictures-{n:05d}", f"{data.fingerprint} {start}") for n, start in enumerate(starts)]

    def reading(self, number: int, left_out: LeftOut) -> AbstractContextManager[Iterator[Sample]]:
        """See `Source`."""
        chosen = range(number * _CHUNK, min((number + 1) * _CHUNK, len(self.data)))
        rows = self.data.rows
        return nullcontext(Sample(rows[i]["id"], _Opened(self.data, i), rows[i]) for i in chosen)


class _Opened:
    def __init__(self, data: CaptionedImages, number: int):
        self.data, self.number = data, number

    def open(self) -> Image.Image:
        return Image.fromarray(np.asarray(self.data.images[self.number]))


class FolderSource:
    """A folder that the user made."""

    fingerprint: str | None = None
    licences: Sequence[LicenceNote] = ()
    parts: list[Part]

    def __init__(self, found: Found):
        self.found, self.root = found, found.root
        self.name = found.root.absolute().name.encode(errors="replace").decode()
        self.notes = found.notes()

    @property
    def left_out(self) -> Sequence[str]:
        """See `Source`; ask before the first part is read."""
        return list(self.found.left_out.found)

    def reading(self, number: int, left_out: LeftOut) -> AbstractContextManager[Iterator[Sample]]:
        """See `Source`."""
        return nullcontext(self.samples(number, left_out))

    def samples(self, number: int, left_out: LeftOut) -> Iterator[Sample]:
        """The samples of a part."""
        raise NotImplementedError


class ShardSource(FolderSource):
    """webdataset shards, each a part."""

    def __init__(self, found: Found):
        super().__init__(found)
        names = enumerate(found.shards)
        self.parts = [Part(f"shard-{n:05d}", f"{name} {_bytes_of(found.root / name)}") for n, name in names]

    def samples(self, number: int, left_out: LeftOut) -> Iterator[Sample]:
        """In the shard's order."""
        name = self.found.shards[number]
        return shard_samples(self.root / name, PurePosixPath(name), len(self.parts), left_out)


class FileSource(FolderSource):
    """Picture files with their captions in `.txt` files and tables; so many a part."""

    def __init__(self, found: Found):
        super().__init__(found)
        root, left_out = found.root, found.left_out
        self.table: dict[str, dict[str, Any] | None] = {}
        for name in found.tables:
            for picture_name, entry in read_table(root / name, PurePosixPath(name).parent, left_out):
                if picture_name in self.table:
                    left_out.tell(
                        f"{root / name} lists {picture_name} twice, or another table does: keep one line of it"
                    )
                self.table[picture_name] = entry
        listed = {name for name in found.others if same_name(name) in self.table}  # of whatever name: bytes decide
        self.pictures = sorted(found.pictures | listed)
        self.stems = [str(PurePosixPath(name).with_suffix("")) for name in self.pictures]
        self.times = Counter(self.stems)
        self._tell_leftovers(listed)
        starts = range(0, len(self.pictures), _CHUNK)
        self.parts = [Part(f"pictures-{n:05d}", self._made_of(start)) for n, start in enumerate(starts)]

    def _made_of(self, start: int) -> str:
        digest = sha256()
        for name, stem in zip(self.pictures[start : start + _CHUNK], self.stems[start : start + _CHUNK], strict=True):
            text = self.found.texts.get(stem)
            row, of_text = self.table.get(same_name(name)), _bytes_of(self.root / text) if text is not None else -1
            digest.update(f"{name}\0{_bytes_of(self.root / name)}\0{of_text}\0{json.dumps(row)}\n".encode())
        return digest.hexdigest()

    def samples(self, number: int, left_out: LeftOut) -> Iterator[Sample]:
        """In the order of their names."""
        root, chosen = self.root, slice(number * _CHUNK, (number + 1) * _CHUNK)
        for name, stem in zip(self.pictures[chosen], self.stems[chosen], strict=True):
            if self.table.get(same_name(name), True) is None:
                continue  # its line was bad, and told
            row, text = self.table.get(same_name(name)), self.found.texts.get(stem)
            with left_out.or_raise():
                if row is None and text is not None:
                    caption = plain_text(read_bytes(root / text, MAX_CAPTION), str(root / text))
                    row = parse_row({}, str(root / text), caption)
                if row is None:
                    raise PocketfusionError(
                        f"{root / name} has no caption: write {PurePosixPath(stem).name}.txt beside it "
                        "or list it in metadata.jsonl"
                    )
            if row is not None:
                key = stem if self.times[stem] == 1 else name
                split = split_of_path(PurePosixPath(name).parts[:-1])
                picture = Stored(root / name, str(root / name))
                yield Sample(key, picture, {"id": key, "split": split, "flip": False, **row})

    def _tell_leftovers(self, listed: set[str]) -> None:
        """Lines of tables and captions without their pictures, and pictures of types that are not read."""
        root, found = self.root, self.found
        for name in sorted(set(self.table) - {same_name(name) for name in self.pictures}):
            found.left_out.tell(
                f"a table in {root} lists {name}, which is not there: remove the line or bring the picture"
            )
        others = {str(PurePosixPath(name).with_suffix("")): name for name in sorted(found.others - listed)}
        for stem in sorted(set(found.texts) - set(self.stems)):
            reason = f"a type that is read: save {others[stem]} as PNG" if stem in others else "its name: remove it"
            found.left_out.tell(f"{root / found.texts[stem]} is a caption without a picture of {reason}")
        for stem, name in others.items():
            if PurePosixPath(name).suffix.lower() in UNREAD and stem not in found.texts:
                found.left_out.tell(f"{root / name} is a picture of a type that is not read: save it as PNG")


def _bytes_of(file: Path) -> int:
    """The size of a file; what cannot be told is when it is read."""
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):
        return -1
