"""What is said of a picture (captions, split, whether it may be mirrored), checked where it is read; bad samples.

And what sources of such pictures give: samples by parts, so that no more than one part is ever in memory.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from reprlib import repr as shorten
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from pocketfusion.data.files import json_lines, parse_json, plain_text, read_bytes
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import LicenceNote

TABLES = ("metadata.jsonl", "metadata.csv")
MAX_CAPTION = 1 << 20  #: bytes of a caption file
#: the Hub's names of splits (`datasets`' SPLIT_KEYWORDS) → ours
_HUB_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "val_combo"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test_combo"),
}
_IN_A_NAME = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(_HUB_SPLITS)})(?:[-._ 0-9]|$)")


class LeftOut:
    """The samples that cannot be used: the first one ends the reading, or with `skip` all are left out and counted."""

    def __init__(self, skip: bool):
        self.skip, self.found = skip, list[str]()

    @contextmanager
    def or_raise(self) -> Iterator[None]:
        """Around the reading of one sample: PocketfusionError passes through unless bad samples are skipped."""
        try:
            yield
        except PocketfusionError as error:
            if not self.skip:
                raise PocketfusionError(f"{error} (--skip-bad leaves such samples out)") from None
            self.found.append(str(error))

    def tell(self, message: str) -> None:
        """A sample that is bad by itself, such as a caption without its picture."""
        with self.or_raise():
            raise PocketfusionError(message)


def left_out_notes(found: Sequence[str]) -> list[str]:
    """What a reader of results must know of samples that were left out."""
    first = "; ".join(found[:3]) + ("; …" if len(found) > 3 else "")
    return [f"{len(found):,} bad samples were left out ({first})."] if found else []


def told_of(name: str, notes: Sequence[str], left_out: Sequence[str], again: int) -> tuple[str, list[str]]:
    """Name and notes of a data set from its source's; `again`: samples whose key another shard has too."""
    told = left_out_notes(left_out) + list(notes)
    if again:
        told.append(f"{again:,} samples have a key that another shard has too: their shards' names tell them apart.")
    return name + (f" ({len(left_out):,} bad samples left out)" if left_out else ""), told


def said(row: Mapping[str, Any], pixels: str) -> bytes:
    """What a fingerprint is made of: a sample's row, before any is held out, and the SHA-256 of its pixels."""
    return json.dumps(row, sort_keys=True).encode() + pixels.encode()


def _kind(value: Any) -> str:
    return {"NoneType": "null", "int": "a number", "float": "a number", "dict": "an object", "bool": "a boolean"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def captions(value: Any, where: str) -> list[str]:
    """One text or a list of them → captions, the plainest first, runs of white space as one space.

    Raises PocketfusionError if one is empty, no text, or holds half a surrogate pair.
    """
    if value == []:
        raise PocketfusionError(f"{where} has an empty list of captions: give a text")
    made = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise PocketfusionError(f"{where} has {_kind(text)} as its caption: give a text or a list of texts")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise PocketfusionError(f"{where} has half a surrogate pair in its caption: write the letter itself")
        if not (text := " ".join(text.split())):
            raise PocketfusionError(f"{where} has an empty caption: write one")
        made.append(text)
    return made


def parse_row(values: Any, where: str, text: str | None = None) -> dict[str, Any]:
    """`captions` (of `text`, else of the key `text` or `caption`) and, where stated, `split` and `flip`.

    Raises PocketfusionError if they are missing or of another type; null is taken as missing for the latter two.
    """
    if not isinstance(values, Mapping):
        raise PocketfusionError(f"{where} is {_kind(values)} and no object with a caption")
    if text is None:
        named = [name for name in ("text", "caption") if name in values]
        if not named:
            raise PocketfusionError(f"{where} has no caption: give it a 'text'")
        if len(named) == 2 and values["text"] != values["caption"]:
            raise PocketfusionError(f"{where} has another 'text' than 'caption': keep one of them")
    row: dict[str, Any] = {"captions": captions(values[named[0]] if text is None else text, where)}
    if (split := values.get("split")) is not None:
        if not isinstance(split, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", split):
            raise PocketfusionError(
                f"{where} has the split {shorten(split)}: give a name of letters, such as val_combo"
            )
        row["split"] = _HUB_SPLITS.get(split, split)
    if (flip := values.get("flip")) is not None:
        if not isinstance(flip, bool):
            raise PocketfusionError(f"{where} has {shorten(flip)} for 'flip': give true or false")
        row["flip"] = flip
    return row


def split_of_path(parts: Iterable[str]) -> str | None:
    """The split that folder or shard names state by one of the Hub's words, as in `test/` or `val-0001.tar`.

    None for training ones: where nothing is held out, some of theirs will be.
    """
    for part in parts:
        if found := _IN_A_NAME.search(part.lower()):
            split = _HUB_SPLITS[found[1]]
            return None if split == "train" else split
    return None


_HELD_OUT = 0.05


def rank(key: str) -> int:
    """A place in an order that no one chose, of 32 bits."""
    return int(sha256(key.encode()).hexdigest()[:8], 16)


def hold_out(ranks: np.ndarray, free: np.ndarray, validated: bool) -> np.ndarray:
    """Which pictures [N] become `val_combo`: of the `free` ones, which state no split, by `rank` of ids.

    None if some are `validated` already; else a twentieth, and two at least if there are four.
    """
    held, numbers = np.zeros(len(ranks), bool), np.flatnonzero(free)
    low = int((ranks[numbers] < _HELD_OUT * 16**8).sum())
    count = 0 if validated else min(max(low, 2), len(numbers) // 2)
    held[numbers[np.argsort(ranks[numbers], kind="stable")[:count]]] = True
    return held


def same_name(name: str) -> str:
    """For comparing file names: macOS writes é as two letters, most tables as one."""
    return unicodedata.normalize("NFC", name)


def read_table(file: Path, folder: PurePosixPath, left_out: LeftOut) -> list[tuple[str, dict[str, Any] | None]]:
    """(path of the picture below the data set's root, row) for each line of `metadata.jsonl` or `.csv` in `folder`;
    None for a row that is left out.

    Raises PocketfusionError if the table cannot be read as a whole; single lines are `left_out`'s matter.
    """
    text = plain_text(read_bytes(file), str(file))
    entries = _csv_lines(text, str(file)) if file.suffix == ".csv" else _json_entries(text, str(file), left_out)
    rows: list[tuple[str, dict[str, Any] | None]] = []
    for where, values in entries:
        picture, row = None, None
        with left_out.or_raise():
            name = values.get("file_name") if isinstance(values, Mapping) else None
            if not isinstance(name, str) or not name:
                raise PocketfusionError(f"{where} has no 'file_name': give the picture's path beside the table")
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
                raise PocketfusionError(f"{where} names {shorten(name)}: give a path below the table's folder, with /")
            picture = same_name(str(folder / path))
            row = parse_row(values, where)
        if picture is not None:
            rows.append((picture, row))
    return rows


def _json_entries(text: str, name: str, left_out: LeftOut) -> Iterator[tuple[str, Any]]:
    for where, line in json_lines(text, name):
        values = None
        with left_out.or_raise():
            values = parse_json(line, where)
        if values is not None or line.strip() == "null":
            yield where, values


def _csv_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    try:
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
    except csv.Error as error:
        raise PocketfusionError(f"{name} is not valid CSV ({error}): save it again with commas and quotes") from None
    header = lines[0] if lines else []
    if "file_name" not in header or len(set(header)) < len(header):
        shown = ", ".join(header)[:80] or "none"
        raise PocketfusionError(f"{name} needs the columns file_name and text, each once, and commas (it has {shown})")
    for number, line in enumerate(lines[1:], 2):
        where = f"{name} row {number}"
        if len(line) != len(header):
            raise PocketfusionError(f"{where} has {len(line)} values for {len(header)} columns: quote commas in texts")
        values: dict[str, Any] = dict(zip(header, line, strict=True))
        values["split"] = values.get("split") or None
        flip = values.get("flip") or None
        values["flip"] = {"true": True, "false": False}.get(flip.lower(), flip) if flip else None
        yield where, values


class Picture(Protocol):
    """What can be opened when its turn comes, in any thread."""

    def open(self) -> Image.Image:
        """Mode RGB, upright; raises PocketfusionError that names the picture."""


class Sample(NamedTuple):
    """A picture that is not decoded yet and its row (`id`, `split` or None, `flip`, `captions`, …).

    `key`: how its shard names it; the id too, unless there are several shards.
    """

    key: str
    picture: Picture
    row: dict[str, Any]


class Part(NamedTuple):
    """What is read at one go. `made_of` changes when the source's files do."""

    name: str
    made_of: str


class Source(Protocol):
    """Captioned pictures by parts."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def parts(self) -> Sequence[Part]:
        """What is read one after the other."""

    @property
    def fingerprint(self) -> str | None:
        """Where it is known without reading the pictures."""

    @property
    def licences(self) -> Sequence[LicenceNote]:
        """Of the pictures."""

    @property
    def notes(self) -> Sequence[str]:
        """What was not read."""

    @property
    def left_out(self) -> Sequence[str]:
        """What was bad before any part was read."""

    def reading(self, number: int, left_out: LeftOut) -> AbstractContextManager[Iterator[Sample]]:
        """The samples of a part; their pictures can be opened inside the block."""
