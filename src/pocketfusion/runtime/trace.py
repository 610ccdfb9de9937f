"""A timeline of a pipeline: when each network was loaded, run and freed, and what memory the process held then.

Beside the file a picture of it (Squeezing's memory figure, arXiv 2307.01193), by Pillow: the runtime has no plotting
library.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from pocketfusion.artefact import atomic_file, check_files, write_json
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


WIDTH, HEIGHT = 1400, 820
#: Everything is drawn twice as large and scaled down, which smooths edges.
_SCALE = 2
_LEFT, _RIGHT, _TOP = 130, 40, 96
_CHART, _LANE, _GAP = 400, 52, 18
_INK, _SOFT, _GRID, _PAPER = "#1f2933", "#66727f", "#e4e8ec", "#ffffff"
_ANON, _FILE = "#3b6ea8", "#b9cfe6"
#: Of each network: colour while it runs, colour while it is only there.
_LANES = {
    "text_encoder": ("text encoder", "#b7791f", "#f3e2c3"),
    "unet": ("UNet", "#2f855a", "#c8e6d5"),
    "decoder": ("decoder", "#9b2c5e", "#efcfdd"),
}
_LOAD = "#8a949e"


def draw(record: dict[str, Any], path: Path) -> None:
    """Writes the picture of a trace's `record` (see `Trace.write`) as PNG, atomically."""
    picture = _Picture(record)
    picture.chart()
    picture.lanes()
    picture.legend()
    with atomic_file(path) as partial:
        picture.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(partial, format="PNG", optimize=True)


class _Picture:
    def __init__(self, record: dict[str, Any]) -> None:
        self.spans, self.samples = record["spans"], record["memory"]
        ends = [span["end"] for span in self.spans] + [sample["seconds"] for sample in self.samples]
        self.seconds = max(ends, default=0.0) or 1.0
        self.image = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), _PAPER)
        self.canvas = ImageDraw.Draw(self.image)
        title = (
            f"{record.get('bundle', 'bundle')}: {record.get('mode', '')} execution, {record.get('steps', '?')} steps"
        )
        self.text((_LEFT, 28), title, 24, _INK)
        if self.samples:
            most = max(sample["anon"] + sample["file"] for sample in self.samples)
            self.text((_LEFT, 64), f"resident memory of the process, at most {most / 1e6:,.0f} MB", 16, _SOFT)

    def x(self, seconds: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * seconds / self.seconds

    def text(self, at: tuple[float, float], words: str, size: int, colour: str, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * _SCALE)
        self.canvas.text((at[0] * _SCALE, at[1] * _SCALE), words, colour, font, anchor)

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        right = max(right, left + 1.0)  # the shortest span stays visible
        self.canvas.rectangle([v * _SCALE for v in (left, top, right, bottom)], colour)

    def chart(self) -> None:
        """Memory over time: the process's own below, pages of files on top of it."""
        bottom = _TOP + _CHART
        top_value, step = _scale(max((s["anon"] + s["file"] for s in self.samples), default=1) / 1e6)

        def y(megabytes: float) -> float:
            return bottom - _CHART * megabytes / top_value

        for k in range(round(top_value / step) + 1):
            self.box(_LEFT, y(k * step), WIDTH - _RIGHT, y(k * step) + 1, _GRID)
            self.text((_LEFT - 12, y(k * step)), f"{k * step:,.0f} MB", 15, _SOFT, "rm")
        for colour, value in ((_FILE, lambda s: s["anon"] + s["file"]), (_ANON, lambda s: s["anon"])):
            self._area(colour, y, value)
        if not self.samples:
            self.text((_LEFT + 20, _TOP + 20), "this system does not tell a process's memory", 16, _SOFT)

    def _area(self, colour: str, y: Callable[[float], float], value: Callable[[dict[str, Any]], int]) -> None:
        points = [(self.x(s["seconds"]), y(value(s) / 1e6)) for s in self.samples]
        if len(points) > 1:
            outline = [(points[0][0], y(0)), *points, (points[-1][0], y(0))]
            self.canvas.polygon([(a * _SCALE, b * _SCALE) for a, b in outline], colour)

    def lanes(self) -> None:
        """One bar per network: loading, there, running; the UNet's steps are numbered where there is room."""
        top = _TOP + _CHART + 30
        for name, (words, running, there) in _LANES.items():
            self.text((_LEFT - 12, top + _LANE / 2), words, 16, _INK, "rm")
            self.box(_LEFT, top + _LANE, WIDTH - _RIGHT, top + _LANE + 1, _GRID)
            spans = [span for span in self.spans if span["network"] == name]
            for begin, end in self._held(spans):
                self.box(self.x(begin), top, self.x(end), top + _LANE, there)
            for span in spans:
                left, right = self.x(span["begin"]), self.x(span["end"])
                if span["kind"] == "load":
                    self.box(left, top, right, top + _LANE, _LOAD)
                elif span["kind"] == "run":
                    edge = 1 if right - left > 4 else 0
                    self.box(left, top + 8, right - edge, top + _LANE - 8, running)
                    if "step" in span and right - left > 22:
                        self.text(((left + right) / 2, top + _LANE / 2), str(span["step"]), 14, _PAPER, "mm")
            top += _LANE + _GAP
        _, step = _scale(self.seconds, 8)
        for k in range(math.floor(self.seconds / step) + 1):
            self.box(self.x(k * step), top - _GAP + 2, self.x(k * step) + 1, top - _GAP + 8, _SOFT)
            self.text((self.x(k * step), top - 4), f"{k * step:g} s", 15, _SOFT, "ma")

    def _held(self, spans: list[dict[str, Any]]) -> Iterator[tuple[float, float]]:
        """From each load to the free after it, or the end."""
        frees = [span["end"] for span in spans if span["kind"] == "free"]
        for load in (span for span in spans if span["kind"] == "load"):
            yield load["end"], min((end for end in frees if end > load["end"]), default=self.seconds)

    def legend(self) -> None:
        entries = [(_ANON, "the process's own"), (_FILE, "pages of files (mapped weights)"), (_LOAD, "loading")]
        entries += [(_LANES["unet"][2], "in memory"), (_LANES["unet"][1], "running")]
        left, top = float(_LEFT), HEIGHT - 42
        for colour, words in entries:
            self.box(left, top, left + 18, top + 18, colour)
            self.text((left + 26, top + 9), words, 15, _SOFT, "lm")
            left += 26 + ImageFont.load_default(15).getlength(words) + 36


def _scale(most: float, parts: int = 5) -> tuple[float, float]:
    """(end, step) of an axis from 0 that reaches `most` in about `parts` round steps."""
    rough = max(most, 1e-9) / parts
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough)
    return math.ceil(most / step) * step, step
