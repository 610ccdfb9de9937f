"""A file that a user brought: opened by us, never as a URL or pattern; text and JSON read strictly or refused."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from pocketfusion.bounded import once
from pocketfusion.errors import PocketfusionError

MAX_BYTES = 1 << 29  #: of a picture or a table: nothing that is meant to be read whole is larger
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def open_file(path: Path) -> BinaryIO:
    """Opens a regular file (or a link to one) for reading.

    Raises PocketfusionError for anything else: a FIFO or device is never waited for or touched.
    """
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            # it may have been exchanged since: O_NONBLOCK opens a FIFO without waiting for its other end
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            file = os.fdopen(os.open(path, flags), "rb")
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise PocketfusionError(f"{path} cannot be opened ({reason}): check that it is there and readable") from None
    kind = "folder" if path.is_dir() else "FIFO, socket or device"
    raise PocketfusionError(f"{path} is a {kind} and no file: remove or rename it")


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A regular file's bytes; raises PocketfusionError if it is none, cannot be read or has more than `limit`."""
    with open_file(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size + 1) if size <= limit else None
        except OSError as error:
            raise PocketfusionError(f"{path} cannot be read ({error.strerror})") from None
    if data is None or len(data) > limit:
        raise PocketfusionError(f"{path} is too large ({limit >> 20} MiB is the most that is read)")
    return data


def plain_text(data: bytes, where: str) -> str:
    """UTF-8, with or without byte-order mark; raises PocketfusionError that says what it looks like, and the cure."""
    if data.startswith(_UTF16) or b"\0" in data:
        raise PocketfusionError(f"{where} is UTF-16 or no text: save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = max(0, error.start - 12)
        seen = data[start : error.start + 12].decode("cp1252", "replace").strip()
        raise PocketfusionError(
            f"{where} is not UTF-8 (in Windows-1252 it would read {seen!r}): save it as UTF-8, "
            "as `iconv -f WINDOWS-1252 -t UTF-8` does"
        ) from None


def read_text(path: Path) -> str:
    """A user's text file; raises PocketfusionError as `read_bytes` and `plain_text` do."""
    return plain_text(read_bytes(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """Like json.loads; raises PocketfusionError for what is no JSON, nests too deeply or has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise PocketfusionError(f"{where} is not valid JSON ({reason}): mend or replace it") from None


def json_lines(text: str, where: str) -> Iterable[tuple[str, str]]:
    """(where, line) of each line that is not blank. Only LF ends a line: U+2028 or U+0085 is text in JSON."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{where} line {number}", line
