"""A flatbuffer read with every offset checked, as fast as Python does it.

Format: https://flatbuffers.dev/internals. A table begins with the distance back to its vtable, which lists where in
the table each field lies (0: absent); strings, vectors and tables inside are told by unsigned distances forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from operator import itemgetter
from struct import Struct, calcsize
from typing import Any

_U16X2, _U32, _I32 = Struct("<HH"), Struct("<I"), Struct("<i")


class Unsound(ValueError):
    """What is wrong with a file, in a clause."""


@lru_cache(maxsize=64)
def _ints(count: int) -> Struct:
    return Struct(f"<{count}i")


class Kind:
    """A kind of table: its fields in order, each a `struct` character and a default, or `at` for a distance forward.

    An absent distance is 0. A field without a character is one that the exporter never writes.
    """

    def __init__(self, *fields: tuple[str, Any] | None | str) -> None:
        self.characters = [None if f is None else "I" if f == "at" else f[0] for f in fields]
        self.defaults = (*(f[1] if isinstance(f, tuple) else 0 for f in fields), 0)
        self.distances = [number for number, f in enumerate(fields) if f == "at"]


#: How tables of one kind and vtable are read: all fields at once, their order, which are distances, the whole length.
_Layout = tuple[Struct, "itemgetter[Any]", "list[tuple[int, int]]", int]


class Flat:
    """A flatbuffer. All methods raise `Unsound` for what would lie outside the file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.end = data, len(data)
        self._layouts: dict[tuple[Kind, int], _Layout] = {}

    def root(self, identifier: bytes) -> int:
        """Where the table lies that the file begins with."""
        if self.end < 8 or self.data[4:8] != identifier:
            raise Unsound(f"it does not begin as a {identifier.decode()} file")
        return int(_U32.unpack_from(self.data, 0)[0])

    def read(self, kind: Kind, position: int) -> list[Any]:
        """The fields of the table at `position`: values, and where what is told by distances lies (0: absent)."""
        if position + 4 > self.end:
            raise Unsound("a table lies outside it")
        at = position - _I32.unpack_from(self.data, position)[0]
        layout = self._layouts.get((kind, at))
        if layout is None:
            layout = self._layouts[kind, at] = self._layout(kind, at)
        fields, order, distances, inline = layout
        if position + inline > self.end:
            raise Unsound("a table reaches beyond its end")
        values = list(order(fields.unpack_from(self.data, position) + kind.defaults))
        for number, offset in distances:
            values[number] += position + offset
        return values

    def _layout(self, kind: Kind, at: int) -> _Layout:
        if at < 0 or at + 4 > self.end:
            raise Unsound("a vtable lies outside it")
        size, inline = _U16X2.unpack_from(self.data, at)
        if size < 4 or size % 2 or at + size > self.end or inline < 4:
            raise Unsound("a vtable is damaged")
        offsets = Struct(f"<{size // 2 - 2}H").unpack_from(self.data, at + 4)
        known, written = kind.characters, sorted((offset, number) for number, offset in enumerate(offsets) if offset)
        if any(number >= len(known) or known[number] is None for _, number in written):
            raise Unsound("a table has fields that the exporter does not write")
        text, end, place = "<", 0, {}
        for index, (offset, number) in enumerate(written):
            if offset < max(end, 4):
                raise Unsound("fields of a table overlap")
            text += f"{offset - end}x{known[number]}"
            end, place[number] = offset + calcsize(f"<{known[number]}"), index
        if end > inline:
            raise Unsound("a field reaches beyond its table")
        order = [place.get(number, len(written) + number) for number in range(len(known))]
        order += [-1] * (2 - len(order))  # of fewer than two, itemgetter gives no tuple
        distances = [(number, offsets[number]) for number in kind.distances if number in place]
        return Struct(text), itemgetter(*order), distances, inline

    def vector(self, start: int, width: int) -> tuple[int, int]:
        """Where the elements of `width` bytes begin and how many there are; (0, 0) for a vector that is absent."""
        if not start:
            return 0, 0
        if start + 4 > self.end:
            raise Unsound("a vector lies outside it")
        count = _U32.unpack_from(self.data, start)[0]
        if start + 4 + count * width > self.end:
            raise Unsound("a vector reaches beyond its end")
        return start + 4, count

    def ints(self, start: int) -> tuple[int, ...]:
        """A vector of int32; empty if it is absent."""
        begin, count = self.vector(start, 4)
        return _ints(count).unpack_from(self.data, begin) if count else ()

    def tables(self, kind: Kind, start: int) -> Iterator[list[Any]]:
        """The tables of a vector; none if it is absent."""
        begin, count = self.vector(start, 4)
        for at in range(begin, begin + 4 * count, 4):
            yield self.read(kind, at + _U32.unpack_from(self.data, at)[0])

    def text(self, start: int) -> bytes:
        """A string, which ends with a NUL behind it because native code reads it up to there; empty if absent."""
        begin, count = self.vector(start, 1)
        if not begin:
            return b""
        if begin + count >= self.end or self.data[begin + count] != 0:
            raise Unsound("a string has no end")
        return bytes(self.data[begin : begin + count])
