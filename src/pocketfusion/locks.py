"""Locks between processes, on run folders and on temporaries; the system drops those of a process that dies."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pocketfusion.errors import PocketfusionError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows has no flock: nothing is locked there
    fcntl = None

LOCK = ".lock"  #: the file in a run folder that is locked; it holds the owner's process number
_held: dict[Path, int] = {}  # folder → descriptor


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder until it is closed: False if another has it, None where nothing can be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def is_open_at(path: Path, descriptor: int) -> bool:
    """Whether what was opened is still what lies at `path`."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except OSError:
        return False


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` if need be and keeps other processes out of it while the block runs.

    Raises PocketfusionError if one is in it.
    """
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def hold(folder: Path) -> None:
    """As `locked`, until `release` or the end of this process, which may ask for a folder that it holds.

    Of the processes of an `accelerate launch`, the first holds it for all.
    """
    folder = folder.absolute()
    if int(os.environ.get("RANK", "0")) > 0:
        return
    if folder in _held:
        if is_open_at(folder / LOCK, _held[folder]):
            return
        os.close(_held.pop(folder))  # deleted since, and another folder may be there
    _held[folder] = _lock(folder)


def release(folder: Path) -> None:
    """Lets other processes into a folder that this one holds, if it does."""
    if (descriptor := _held.pop(folder.absolute(), None)) is not None:
        os.close(descriptor)


@atexit.register
def _leave_none_empty() -> None:
    """A command that was refused after all leaves no run folder with a lock in it alone."""
    for folder, descriptor in _held.items():
        with suppress(OSError):
            if is_open_at(folder / LOCK, descriptor) and os.listdir(folder) == [LOCK]:
                (folder / LOCK).unlink()
                folder.rmdir()


def _lock(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        if try_lock(descriptor) is False:
            owner = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise PocketfusionError(
                f"{folder} is in use by another run (process {owner}): wait for its end, or choose another place"
            )
        if is_open_at(file, descriptor):
            break
        os.close(descriptor)  # its last owner has just deleted it
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    return descriptor
