"""How fast a run is and what it uses: samples and model FLOP a second, the share of the device's peak, memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

from pocketfusion.runtime.memory import peak_rss

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
