"""What a run shows and leaves behind: a progress bar, `log.jsonl`, a loss plot and preview pictures."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from pocketfusion.artefact import atomic_file
from pocketfusion.recipe import TrainSettings
from pocketfusion.terminal import titled
from pocketfusion.train.throughput import Meter

if TYPE_CHECKING:
    from rich.progress import Progress


_FLOP = "model_flop_per_sample"  #: of the first line that knows it


class TrainLog:
    """Log of one run; a resumed run drops lines past its checkpoint, so the log reads as one uninterrupted run."""

    def __init__(self, run: Path, step: int, settings: TrainSettings, meter: Meter, *, enabled: bool):
        self.run, self.settings, self.meter, self.enabled = run, settings, meter, enabled
        self.path = run / "log.jsonl"
        lines = read_log(run) if self.path.is_file() else []
        self.lines = [line for line in lines if line["step"] <= step]
        self.seconds = max((line["seconds"] for line in self.lines), default=0.0)
        self.skipped = sum("skipped" in line for line in self.lines)  #: steps without finite gradients
        # counting is no part of a step that is repeated: torch's other kernels under it round otherwise
        meter.flops.per_sample = next((line[_FLOP] for line in self.lines if _FLOP in line), None)
        self._flop_told = meter.flops.per_sample is not None
        self._last = time.monotonic()
        self._bar: Progress | None = None
        self._step = step
        self._file: TextIO | None = None

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Shows the bar and keeps the log file open."""
        if not self.enabled:
            yield
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
        self._bar = bar = Progress(
            *columns, TextColumn("{task.fields[speed]} samples/s"), TimeElapsedColumn(), TimeRemainingColumn()
        )
        total = max(self.settings.steps, self._step)
        self._task = bar.add_task(titled("training"), total=total, completed=self._step, loss="-", speed="-")
        (self.run / "previews").mkdir(exist_ok=True)
        with atomic_file(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines), encoding="utf-8")
        with bar, self.path.open("a", encoding="utf-8") as file:
            self._file = file
            self._last = time.monotonic()
            yield
        self.plot()

    def add(
        self, step: int, loss: float, learning_rate: float, gradient_norm: float, figures: dict[str, float]
    ) -> dict[str, float]:
        """One line a step, which it gives; of a skipped one, whose gradient norm is not finite, how many by now."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self.seconds += elapsed
        if not self.enabled or self._file is None or self._bar is None:
            return {}
        line = {"step": step, "learning_rate": learning_rate, "seconds": round(self.seconds, 3)}
        line |= self.meter.figures(self.settings.batch_size, elapsed)
        if self.meter.flops.per_sample and not self._flop_told:
            line |= {_FLOP: self.meter.flops.per_sample}
            self._flop_told = True
        if math.isfinite(gradient_norm):
            line |= {"loss": loss, "gradient_norm": gradient_norm, **figures}
        else:
            self.skipped += 1
            line |= {"skipped": self.skipped}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        if step % 20 == 0:
            self.flush()
        speed = f"{self.settings.batch_size / max(elapsed, 1e-9):.0f}"
        self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", speed=speed)
        return line

    def prolong(self, steps: int) -> None:
        """Training goes on to `steps`."""
        if self._bar is not None:
            self._bar.update(self._task, total=steps)

    def flush(self) -> None:
        """Lets the lines so far survive a kill."""
        if self._file is not None:
            self._file.flush()

    def held_out(self, step: int, figures: dict[str, float]) -> None:
        """Held-out figures of a step, printed above the bar and kept in the log."""
        self._last = time.monotonic()  # looking is not training time
        if not self.enabled or self._file is None or self._bar is None or not figures:
            return
        line = {"step": step, "seconds": round(self.seconds, 3), "held_out": figures}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self.flush()
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._bar.console.print(f"step {step}: {shown}", highlight=False)
        self.plot()

    def preview_path(self, step: int) -> Path:
        """Where the preview picture of a step goes."""
        return self.run / "previews" / f"step_{step:08d}.png"

    def plot(self) -> None:
        """Writes `loss.png`: the loss and its running mean over samples."""
        points = [(line["step"], line["loss"]) for line in self.lines if "loss" in line]
        if len(points) < 2:
            return
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        steps, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        width = max(1, min(100, len(losses) // 10))
        mean = np.convolve(losses, np.ones(width) / width, mode="valid")
        figure, axes = plt.subplots(figsize=(7, 4), dpi=100)
        axes.plot(steps * self.settings.batch_size, losses, color="0.8", linewidth=0.7)
        axes.plot(
            steps[width - 1 :] * self.settings.batch_size, mean, color="tab:blue", label=f"mean of {width} steps"
        )
        axes.set(xlabel="samples seen", ylabel="loss", yscale="log", title=f"{self.run.name}")
        axes.legend()
        figure.tight_layout()
        with atomic_file(self.run / "loss.png") as partial:
            figure.savefig(partial)
        plt.close(figure)


def read_log(run: Path) -> list[dict]:
    """The lines of a run's `log.jsonl`; a last line cut short by a kill is left out."""
    lines = []
    for text in (run / "log.jsonl").read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
