"""What lies in a folder of captioned pictures: names by kind, and what is missing among them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pocketfusion.data.pictures import PICTURES, UNREAD
from pocketfusion.data.rows import TABLES, LeftOut
from pocketfusion.errors import PocketfusionError

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_TEXTS = ("readme", "license", "licence", "licenses", "notice", "copyright", "changelog")  #: .txt that are no captions
_NUMBERED = re.compile(r"(.*?)(\d{4,6})(\D*)\.tar")


class Found:
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
        tell_gaps(self.shards, str(root), left_out)

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


def tell_gaps(shards: Sequence[str], where: str, left_out: LeftOut) -> None:
    """Numbers missing in the middle of shards that are numbered with four to six digits; dates have larger gaps."""
    series: dict[tuple[str, ...], dict[int, str]] = {}
    for name in shards:
        if found := _NUMBERED.fullmatch(name):
            series.setdefault((found[1], found[3], str(len(found[2]))), {})[int(found[2])] = name
    for (before, after, width), numbers in series.items():
        missing = sorted(set(range(min(numbers), max(numbers))) - set(numbers))
        if 0 < len(missing) < len(numbers):
            named = ", ".join(f"{before}{number:0{width}d}{after}.tar" for number in missing[:3])
            first, last, more = numbers[min(numbers)], numbers[max(numbers)], ", …" if len(missing) > 3 else ""
            left_out.tell(f"{where} lacks {named}{more} between {first} and {last}: fetch what is missing")
