"""The terminal: text that others wrote is shown, never obeyed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console as RichConsole
from rich.text import Text

#: Control characters but tab and line feed, half characters, and those that turn the direction of text or hide in it.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(text: str) -> str:
    """`text` with what a terminal would act on, or cannot write, as its code: ESC becomes \\x1b."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def printable_json(text: str) -> str:
    """JSON `text` with the same characters, which it can only have inside of strings, as JSON writes their codes."""
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Console(RichConsole):
    """Rich's console, whose every string is `printable`, also in tables."""

    def render_str(self, text: str, **settings: Any) -> Text:
        return super().render_str(printable(text), **settings)


_part_of: ContextVar[str] = ContextVar("part_of", default="")


@contextmanager
def part_of(work: str) -> Iterator[None]:
    """Bars that are begun in this block are headed by `work`."""
    token = _part_of.set(work)
    try:
        yield
    finally:
        _part_of.reset(token)


def titled(what: str) -> str:
    """The description of a bar that shows `what`."""
    return f"{_part_of.get()} · {what}" if _part_of.get() else what
