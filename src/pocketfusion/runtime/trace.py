"""A timeline of a pipeline: when each network was loaded, run and freed, and what memory the process held then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketfusion.artefact import check_writable_parent, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.memory import memory

#: Seconds between two samples. One takes about 50 microseconds of a core.
INTERVAL = 0.005


class Trace:
    """Records spans (`load`, `run`, `free`, `wait`) of networks, and samples memory in a thread.

    Without a file it does nothing.
    """

    def __init__(self, file: Path | str | None = None) -> None:
        """Begins sampling, if `file` is given. Raises PocketfusionError if it or its picture cannot be written."""
        self.file = None if file is None else Path(file)
        self._spans: list[dict[str, Any]] = []
        self._samples: list[tuple[float, int, int]] = []
        self._start = time.perf_counter()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        if self.file is not None:
            check_trace(self.file)
            self._thread = threading.Thread(target=self._watch, name="trace", daemon=True)
            self._thread.start()

    @property
    def picture(self) -> Path | None:
        """Where the picture goes: beside the file, with the ending .png."""
        return self.file.with_suffix(".png") if self.file else None

    @contextmanager
    def span(self, kind: str, network: str, **more: Any) -> Iterator[None]:
        """Records the block as a span of `network`; `more` goes into it (such as the step)."""
        begin = self._now()
        try:
            yield
        finally:
            if self._thread is not None:
                self._sample()  # so that even a short span has one
                self._spans.append(
                    {"kind": kind, "network": network, "begin": begin, "end": round(self._now(), 6), **more}
                )

    def write(self, **about: Any) -> None:
        """Writes the file and its picture: all since the beginning. `about` goes into the file."""
        if self.file is None or self.picture is None:
            return
        from pocketfusion.runtime.trace_picture import draw

        self._sample()
        names = ("seconds", "anon", "file")
        record = {
            **about,
            "spans": sorted(self._spans, key=lambda span: span["begin"]),
            "memory": [dict(zip(names, sample, strict=True)) for sample in sorted(self._samples)],
        }
        write_json(self.file, record)
        draw(record, self.picture)

    def close(self) -> None:
        """Ends the sampling."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _now(self) -> float:
        return round(time.perf_counter() - self._start, 6)

    def _sample(self) -> None:
        held = memory()
        if held is not None:
            self._samples.append((self._now(), held.anon, held.file))

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._sample()


def check_trace(file: Path) -> None:
    """Raises PocketfusionError unless `file` ends in .json and can be written."""
    if file.suffix.lower() != ".json":
        raise PocketfusionError(f"the trace is {file}: give it a name that ends in .json")
    if file.is_dir():
        raise PocketfusionError(f"{file} is a folder: give the name of a file in it")
    check_writable_parent(file)
