"""Artefacts on disk: written beside their final name and renamed at the end, so none is ever half-written.

What killed runs left beside it (`temporaries`) is removed by the next run that writes there. What takes its place is
on the disk before it does, so that a power failure leaves the old or the new.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pocketfusion.errors import PocketfusionError, number_of
from pocketfusion.locks import fcntl, try_lock
from pocketfusion.temporaries import NO_LINK, clean, name_for, remove, temporary

_LONGEST = 220  # bytes of a name: its temporary's has 24 more and a suffix, and file systems take 255
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_cleaned: set[Path] = set()


def sha256_file(path: Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(f)


def _digest(f: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def sha256_folder(path: Path, exclude: tuple[str, ...] = ()) -> str:
    """One SHA-256 over the names and contents of all files below `path`, except those named in `exclude`."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name not in exclude):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def check_writable_parent(path: Path) -> None:
    """Raises PocketfusionError unless a file or folder can be created at `path`, or take the place of one."""
    path = _absolute(path)
    parent = path.parent
    if _special(path):
        raise PocketfusionError(f"{path} is a device, pipe or socket: choose the name of a file")
    if not parent.is_dir():
        raise PocketfusionError(f"the folder {parent} does not exist: create it or choose another output path")
    if (length := len(os.fsencode(path.name))) > _LONGEST:
        raise PocketfusionError(
            f"the name {path.name[:20]}… has {length} bytes: choose an output path whose name has at most {_LONGEST}"
        )
    try:  # os.access() says yes to root on read-only mounts, so try for real
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror
        raise PocketfusionError(f"cannot write into {parent} ({reason}): choose another output path") from None
    if parent not in _cleaned:
        clean(parent)
        _cleaned.add(parent)


def check_files(*paths: Path | None) -> None:
    """Raises PocketfusionError unless a file can be written at each of `paths` that is given, all different."""
    for path in paths:
        if path is not None:
            check_writable_parent(path)
            if path.is_dir():
                raise PocketfusionError(f"{path} is a folder: give the name of a file in it")
    check_different(*paths)


def check_different(*paths: Path | None) -> None:
    """Raises PocketfusionError if two of the outputs that are given have one name."""
    seen = set()
    for path in paths:
        if path is not None:
            place = _absolute(path)
            if (name := place.parent.resolve() / place.name) in seen:
                raise PocketfusionError(f"{path} is given for two outputs: choose another name for one of them")
            seen.add(name)


def free_space(path: Path) -> int:
    """Bytes that are free where `path` is, or is to be written."""
    return shutil.disk_usage(path if path.is_dir() else _absolute(path).parent).free


def check_space(path: Path, needed: float, what: str) -> None:
    """Raises PocketfusionError unless the `needed` bytes of `what` are free where `path` is, or is to be written."""
    if (free := free_space(path)) < needed:
        raise PocketfusionError(
            f"{what} needs about {needed / 1e6:,.0f} MB of disk for {path} and {free / 1e6:,.0f} MB are free: free "
            "some, or choose a place on another disk"
        )


#: What tells a folder that was written here: of models and judges, bundles, data, caches, scores, curves, kits, packs
#: and sites.
MARKS = (
    "provenance.json", "bundle.json", "dataset.json", "cache.json", "scores.json", "curve.json", "vectors.json",
    "pack.json", "device-pack.json", "bundles.json",
)  # fmt: skip


def check_new(path: Path, overwrite: bool = False) -> None:
    """Raises PocketfusionError unless a user's output folder can be written at `path`.

    Nothing may be there but, with `overwrite`, an empty folder or one that was written here (see `MARKS`), and the
    process may not work in it: all of it is deleted.
    """
    _check_free(path, overwrite)
    if path.is_symlink() or not path.is_dir():
        return
    if Path.cwd().is_relative_to(path.resolve()):
        raise PocketfusionError(f"{path} is the folder that you work in, or above it: choose another output path")
    if any(path.iterdir()) and not any((path / mark).is_file() for mark in MARKS):
        raise PocketfusionError(
            f"{path} holds other things than what is written here: it is not replaced, choose another output path"
        )


def _check_free(path: Path, overwrite: bool) -> None:
    check_writable_parent(path)
    if os.path.lexists(path) and not overwrite:
        raise PocketfusionError(f"{path} exists already: choose another output path or pass --overwrite")
    if path.exists() and not path.is_dir():
        raise PocketfusionError(f"{path} is a file and the output a folder: choose another output path")


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary neighbour of `path` that takes its place only if the block ends without an exception.

    The old folder is renamed away, in the same system call where the system can, and then deleted; its mode is kept.
    A link at `path` is replaced, and what it points to stays as it is.
    Raises PocketfusionError if `path` exists and `overwrite` is false, or if it cannot be written.
    """
    given, path = path, _absolute(path)
    clean(path.parent)
    _check_free(path, overwrite)
    mode = _mode(path)
    made = temporary(path, folder=True, mode=0o777 if mode is None else 0o700)
    with made as partial, _named(given, partial):
        yield partial
        if mode is not None:
            partial.chmod(mode)
        _sync(partial)
        if overwrite and os.path.lexists(path):
            _replace(partial, path)
        else:
            try:
                partial.rename(path)
            except OSError:
                _check_free(path, False)  # another process may have been faster
                raise
        _sync(path.parent, below=False)


@contextmanager
def _named(path: Path, partial: Path) -> Iterator[None]:
    """Has a full disk told of with `path`: most writers name no file, and `partial` is gone when it is read."""
    try:
        yield
    except Exception as error:
        number, name = number_of(error), getattr(error, "filename", None)
        if number not in _FULL or (name and not Path(os.fsdecode(name)).is_relative_to(partial)):
            raise
        raise OSError(number, os.strerror(number), os.fspath(path)) from error


@contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary neighbour of `path` that replaces it only if the block ends without an exception.

    The old file's mode is kept. A link at `path` is replaced, and what it points to stays as it is. Not `durable` is
    for what is made anew if a power failure damages it.
    Raises PocketfusionError if `path` cannot be written.
    """
    given, path = path, _absolute(path)
    check_files(path)
    mode = _mode(path)
    made = temporary(path, folder=False, mode=0o666 if mode is None else 0o600)
    with made as partial, _named(given, partial):
        yield partial
        if mode is not None:
            partial.chmod(mode & 0o777)
        if durable:
            _sync(partial)
        os.replace(partial, path)
        if durable:
            _sync(path.parent, below=False)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Copies the contents of a file, atomically."""
    with atomic_file(target) as partial:
        shutil.copyfile(source, partial)


def reserve(file: Path) -> None:
    """Gives a file all of its space: a disk too full for it is an OSError, and not a crash where it is mapped."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as f:
            os.posix_fallocate(f.fileno(), 0, file.stat().st_size)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _special(path: Path) -> bool:
    """Whether a device, pipe or socket is there, or a link to one: /dev/stdout is a link, whatever it leads to now."""
    if not os.path.lexists(path):
        return False
    system = path.parent.resolve()
    if system == Path("/dev") or system.is_relative_to("/proc"):
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:  # a link to nothing
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _mode(path: Path) -> int | None:
    """The permissions of what lies at `path`; None for nothing and for a link."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return None
    return None if stat.S_ISLNK(mode) else stat.S_IMODE(mode)


def _replace(partial: Path, path: Path) -> None:
    """Puts a folder in the place of what lies at `path`, which is then deleted."""
    if _exchange(partial, path):
        return  # the old one has the temporary's name, and goes with it
    old = name_for(path, "old")
    descriptor = None
    with suppress(OSError):  # a link
        descriptor = os.open(path, os.O_RDONLY | NO_LINK)
        try_lock(descriptor)  # else another process would put it back
    try:
        path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            old.rename(path)
            raise
        remove(old)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps the two in one step; False where the system or the file system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _sync(path: Path, *, below: bool = True) -> None:
    """Waits until a file, or a folder and with `below` all in it, is on the disk."""
    if fcntl is None or path.is_symlink():
        return
    folder = path.is_dir()
    if folder and below:
        for child in path.iterdir():
            _sync(child)
    descriptor = os.open(path, os.O_RDONLY | NO_LINK)
    try:
        os.fsync(descriptor)
    except OSError:
        if not folder:  # some file systems refuse it for folders
            raise
    finally:
        os.close(descriptor)
