"""The bar of a cache that is being filled: parts, pictures and pictures a second."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pocketfusion.terminal import Console, titled


class PartsBar:
    """Context of a bar on standard error; `add` hears what `fill` tells."""

    def __init__(self, what: str, parts: int, shown: bool = True):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not shown
        )
        self.task = self.bar.add_task(titled(what), total=parts, rate="")
        self.began, self.pictures, self.parts = time.monotonic(), 0, dict[str, int]()

    def __enter__(self) -> PartsBar:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.update(self.task, completed=len(self.parts) if error[0] is None else max(0, len(self.parts) - 1))
        self.bar.stop()

    def add(self, count: int, part: str) -> None:
        """So many more pictures of a part."""
        new = part not in self.parts
        self.parts[part] = self.parts.get(part, 0) + count
        self.pictures += count
        if new or self.pictures % 64 < count:
            rate = self.pictures / (time.monotonic() - self.began)
            said = f"{self.pictures:,} pictures, {rate:,.0f} a second"
            self.bar.update(self.task, completed=len(self.parts) - 1, rate=said)
