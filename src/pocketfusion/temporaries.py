"""Temporary files and folders: a name that nobody can guess, created anew, locked while its owner lives.

So whatever a killed run left is known by its free lock.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pocketfusion.locks import fcntl, is_open_at, try_lock

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NAMES = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(partial|old)(\.[^.]*)?", re.S)


def name_for(path: Path, kind: str) -> Path:
    """A new name beside `path`, of `kind` "partial" or "old"."""
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.{kind}")


@contextmanager
def temporary(path: Path, *, folder: bool, mode: int) -> Iterator[Path]:
    """A new, locked neighbour of `path`; removed after the block, if it still has this name."""
    suffix = "" if folder else path.suffix  # some writers go by it
    while True:
        made = name_for(path, f"partial{suffix}")
        if folder:
            made.mkdir(mode)
            if fcntl is None:
                descriptor = None
                break
            try:
                descriptor = os.open(made, os.O_RDONLY | os.O_DIRECTORY | NO_LINK)
            except FileNotFoundError:
                continue
        else:
            descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_LINK, mode)
        try_lock(descriptor)
        if is_open_at(made, descriptor):
            break
        os.close(descriptor)  # taken for a dead run's before it was locked
    if fcntl is None and descriptor is not None:
        os.close(descriptor)  # Windows renames no open file
        descriptor = None
    try:
        yield made
    finally:
        remove(made)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def scratch_folder(name: str, place: Path | None = None) -> Iterator[Path]:
    """A private folder that is gone after the block, in `place` or the system's folder for temporary files."""
    place = Path(tempfile.gettempdir()) if place is None else place.absolute()
    clean(place)
    with temporary(place / name, folder=True, mode=0o700) as folder:
        yield folder


def clean(place: Path) -> None:
    """Removes the temporaries in `place` whose owner is dead, and puts back what it had renamed away."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            named = _NAMES.fullmatch(entry.name)
            if named is not None and entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                with suppress(OSError):
                    _clean_one(place / entry.name, place / named[1], named[2])


def _clean_one(path: Path, target: Path, kind: str) -> None:
    if stat.S_IFMT(os.lstat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        return
    descriptor = os.open(path, os.O_RDONLY | NO_LINK | os.O_NONBLOCK)
    try:
        if not try_lock(descriptor) or not is_open_at(path, descriptor):
            return
        if kind == "old" and not os.path.lexists(target):
            path.rename(target)
        else:
            remove(path)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    with suppress(OSError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            path.chmod(0o700)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
