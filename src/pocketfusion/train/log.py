"""What a run shows and leaves behind: a bar, its speed, `log.jsonl`, a loss plot, previews; what trackers are told."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from pocketfusion.artefact import atomic_file
from pocketfusion.recipe import TrainSettings
from pocketfusion.runtime.memory import peak_rss
from pocketfusion.terminal import titled

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


class Trackers:
    """What a run's trackers are told; nothing at all without any, or on another process than the first."""

    def __init__(self, accelerator: Any, run: Path, settings: dict[str, Any], names: Iterable[str]):
        self.names = list(names)
        self.accelerator = accelerator
        if self.names:
            config = {
                key: value if isinstance(value, int | float | str) else str(value) for key, value in settings.items()
            }
            accelerator.init_trackers("pocketfusion", config=config, init_kwargs={"wandb": {"name": run.name}})

    def log(self, step: int, values: dict[str, float]) -> None:
        """Figures of a step."""
        if self.names:
            self.accelerator.log(values, step=step)

    def picture(self, step: int, file: Path) -> None:
        """A preview, for trackers that show pictures."""
        if not self.names:
            return
        pixels = np.asarray(Image.open(file).convert("RGB"))[None]
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                how = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"preview": pixels}, step=step, **how)

    def finish(self) -> None:
        """Lets them write what they hold; `Accelerator.end_training` would end the process group too."""
        for tracker in self.accelerator.trackers if self.names else ():
            tracker.finish()


#: Dense bf16 TFLOP/s by a part of the name that CUDA gives, as their makers' data sheets state them.
PEAKS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
}


def peak_tflops(device: torch.device, mixed_precision: str) -> float | None:
    """The device's bf16 peak; None where it is not known or not what the run computes in."""
    if device.type != "cuda" or mixed_precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


class ModelFlops:
    """Counts a part of a step once with torch's FlopCounterMode; what checkpointing computes again is not counted."""

    def __init__(self) -> None:
        self.per_sample: float | None = None
        self._counter: FlopCounterMode | None = None
        self._again = 0.0

    @contextmanager
    def counting(self, samples: int, compiled: bool = False) -> Iterator[None]:
        """Around the forward and backward pass of so many samples; a `compiled` network runs as it is written."""
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with eager, FlopCounterMode(display=False) as self._counter:
            yield
        self.per_sample = (self._counter.get_total_flops() - self._again) / samples
        self._counter = None

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Around what was computed before."""
        if self._counter is None:
            yield
            return
        before = self._counter.get_total_flops()
        try:
            yield
        finally:
            self._again += self._counter.get_total_flops() - before


class Meter:
    """The figures of one process's run for its log."""

    def __init__(self, device: torch.device, mixed_precision: str, processes: int):
        self.device, self.processes, self.flops = device, processes, ModelFlops()
        self.peak = peak_tflops(device, mixed_precision)

    def figures(self, samples: int, seconds: float) -> dict[str, float]:
        """Of a step: its speed over all processes, its FLOP/s and their share of all devices' peaks, the memory that
        this process took at most (`memory_gb`: allocated on a GPU, resident on a CPU)."""
        rate = samples / max(seconds, 1e-9)
        found = {"samples_per_second": round(rate, 3)}
        if self.flops.per_sample:
            speed = rate * self.flops.per_sample / 1e12
            found["model_tflops"] = round(speed, 4)
            if self.peak:
                found["peak_share"] = round(speed / (self.peak * self.processes), 4)
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak_rss()
        return found | ({"memory_gb": round(memory / 1e9, 3)} if memory else {})
