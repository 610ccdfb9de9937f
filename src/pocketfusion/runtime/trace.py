"""A timeline of a pipeline: when each network was loaded, run and freed, and what memory the process held then."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketfusion.artefact import check_files, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.memory import memory

#: Seconds between two samples.
INTERVAL = 0.005
#: A process of its own takes the samples: LiteRT holds Python's lock while it packs weights, and so would stop a
#: thread when there is most to see. Both read one clock: on Linux `perf_counter` is the system's monotonic one.
_SAMPLER = """
import sys, time
status, interval = open(f"/proc/{sys.argv[1]}/status"), float(sys.argv[2])
while True:
    status.seek(0)
    held = dict(line.split(":", 1) for line in status.read().splitlines())
    now = time.perf_counter()
    anon, shared, file = (int(held[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem", "RssFile"))
    print(now, anon + shared, file, flush=True)
    time.sleep(interval)
"""


class Trace:
    """Records spans (`load`, `run`, `free`, `wait`) of networks, and samples memory.

    Without a file it does nothing.
    """

    def __init__(self, file: Path | str | None = None) -> None:
        """Begins sampling, if `file` is given. Raises PocketfusionError if it or its picture cannot be written."""
        self.file = None if file is None else Path(file)
        self._spans: list[dict[str, Any]] = []
        self._start = time.perf_counter()
        self._sampler: subprocess.Popen[bytes] | None = None
        if self.file is not None:
            check_trace(self.file)
            self._lines = tempfile.NamedTemporaryFile(prefix="pocketfusion-trace-")  # noqa: SIM115  (until close)
            if memory() is not None:
                # -S -E: nothing of the user's is imported; it ends by itself when this process is gone
                command = [sys.executable, "-S", "-E", "-c", _SAMPLER, str(os.getpid()), str(INTERVAL)]
                self._sampler = subprocess.Popen(command, stdout=self._lines, stderr=subprocess.DEVNULL)

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
            if self.file is not None:
                self._spans.append(
                    {"kind": kind, "network": network, "begin": begin, "end": round(self._now(), 6), **more}
                )

    def write(self, **about: Any) -> None:
        """Writes the file and its picture: all since the beginning. `about` goes into the file."""
        if self.file is None or self.picture is None:
            return
        from pocketfusion.runtime.trace_picture import draw

        record = {
            **about,
            "spans": sorted(self._spans, key=lambda span: span["begin"]),
            "memory": self._samples(),
        }
        write_json(self.file, record)
        draw(record, self.picture)

    def close(self) -> None:
        """Ends the sampling."""
        if self._sampler is not None:
            self._sampler.kill()
            self._sampler.wait()

    def _now(self) -> float:
        return round(time.perf_counter() - self._start, 6)

    def _samples(self) -> list[dict[str, float]]:
        rows = [
            line.split() for line in Path(self._lines.name).read_text().splitlines(keepends=True) if line[-1] == "\n"
        ]
        return [
            {"seconds": round(max(0.0, float(now) - self._start), 6), "anon": int(anon), "file": int(file)}
            for now, anon, file in rows
        ]


def check_trace(file: Path) -> None:
    """Raises PocketfusionError unless `file` ends in .json, and it and its picture can be written."""
    if file.suffix.lower() != ".json":
        raise PocketfusionError(f"the trace is {file}: give it a name that ends in .json")
    check_files(file, file.with_suffix(".png"))
