"""Artefacts on disk: written beside their final name and renamed at the end, so none is ever half-written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketfusion.errors import PocketfusionError


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
    """Raises PocketfusionError unless a file or folder can be created at `path`."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise PocketfusionError(f"the folder {parent} does not exist: create it or choose another output path")
    try:  # os.access() says yes to root on read-only mounts, so try for real
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror
        raise PocketfusionError(f"cannot write into {parent} ({reason}): choose another output path") from None


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary neighbour of `path` that takes its place only if the block ends without an exception.

    A neighbour that an earlier killed run left behind is removed first.
    Raises PocketfusionError if `path` exists and `overwrite` is false, or if its parent cannot be written.
    """
    check_writable_parent(path)
    if path.exists() and not overwrite:
        raise PocketfusionError(f"{path} exists already: choose another output path or pass --overwrite")
    partial = path.absolute().with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary neighbour of `path` that replaces it only if the block ends without an exception."""
    check_writable_parent(path)
    partial = path.absolute().with_name(f".{path.name}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
