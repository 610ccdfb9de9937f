"""What sources of captioned pictures give: samples by parts, so that no more than one part is ever in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from PIL import Image

from pocketfusion.data.rows import LeftOut
from pocketfusion.models.licences import LicenceNote


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
