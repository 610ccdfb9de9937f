"""What progress bars say of the work that they are a part of: `compress` names its stage on all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

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
