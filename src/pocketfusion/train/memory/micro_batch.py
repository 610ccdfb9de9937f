"""In how many parts a process does its share of a batch: as the recipe says, or as many as fit, found by trial."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.processes import process_state
from pocketfusion.recipe import TrainSettings
from pocketfusion.runtime.memory import available_memory, forget_peak, memory, peak_rss, release
from pocketfusion.train.memory.lean import MOMENT_BYTES

_FILLED = 0.85  #: share of the memory that a trial may take: later batches have more guided samples


def parts_of(settings: TrainSettings, processes: int) -> int:
    """Parts of each process's share of a batch by the settings; with `auto`, one until a trial says better.

    Raises PocketfusionError for a batch that does not divide.
    """
    batch, micro = settings.batch_size, settings.micro_batch
    if micro is None:
        parts = settings.gradient_accumulation
        if batch % (processes * parts):
            raise PocketfusionError(
                f"batch_size {batch} does not divide by {processes} processes x {parts} accumulation parts: "
                f"choose a multiple of {processes * parts}"
            )
        return parts
    if batch % processes:
        raise PocketfusionError(
            f"batch_size {batch} does not divide by {processes} processes: choose a multiple of {processes}, or "
            f"{max(n for n in range(1, processes) if batch % n == 0)} processes"
        )
    share = batch // processes
    return 1 if micro == "auto" else next(n for n in range(1, share + 1) if share % n == 0 and share // n <= micro)


def parts_by_trial(
    task: Any, model: nn.Module, settings: TrainSettings, autocast: Callable[[], Any], device: torch.device
) -> int:
    """As `parts_of`, for the largest part whose forward and backward pass fits into the memory that is left.

    Doubles the part while the next is expected to fit: its memory is taken to grow by a part's samples as it did from
    the one before. All processes agree on the smallest. Raises PocketfusionError if not even one sample fits.
    """
    share = settings.batch_size // process_state().num_processes
    fits, peaks, budget = 0, list[tuple[int, float]](), _budget(model, settings, device)
    for size in (n for n in range(1, share + 1) if share % n == 0):
        peak = _expected(peaks, size)
        if peak <= budget:
            # the first step leaves no block out, the last has the largest pictures
            peak = max(_peak(task, model, step, size, autocast, device) for step in {0, settings.steps - 1})
        if not _all_agree(peak <= budget, device):
            break
        fits = size
        peaks.append((size, peak))
    if not fits:
        raise PocketfusionError(
            f"not one sample fits into the memory ({budget / 1e9:.1f} GB): set gradient_checkpointing, offload or "
            "optimizer adamw-8bit (`pocketfusion plan` says what fits)"
        )
    return share // fits


def _expected(peaks: list[tuple[int, float]], size: int) -> float:
    """What `size` samples will take, on the line through the last two peaks; 0 before there are two."""
    if len(peaks) < 2:
        return 0.0
    (small, low), (large, high) = peaks[-2:]
    return high + (size - large) * max(0.0, high - low) / (large - small)


def _all_agree(fits: bool, device: torch.device) -> bool:
    agreed = torch.tensor(float(fits), device=device)
    if process_state().num_processes > 1:
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MIN)
    return bool(agreed)


def _budget(model: nn.Module, settings: TrainSettings, device: torch.device) -> float:
    """Bytes that a trial may take beside what is held now: AdamW's moments and the average are still to come."""
    free = available_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        free -= torch.cuda.memory_allocated(device)
    states = MOMENT_BYTES[settings.optimizer] + (0 if "ema" in settings.offload and device.type == "cuda" else 4)
    return _FILLED * free - states * sum(p.numel() for p in model.parameters())


def _peak(
    task: Any, model: nn.Module, step: int, size: int, autocast: Callable[[], Any], device: torch.device
) -> float:
    """Bytes that a part of `size` samples takes; infinity if they are not there."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        release()
        now = memory()
        before = now.total if now else 0
        forget_peak()  # where it cannot, trials end early
    batch = task.plan.slice(step, 0, size)
    if hasattr(task, "means"):
        batch.means = torch.ones(2)  # any: nothing is exchanged while a process may run out of memory
    try:
        with autocast():
            loss, _ = task.loss(model, batch)
        loss.backward()
    except (torch.OutOfMemoryError, MemoryError):
        return math.inf
    finally:
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.empty_cache()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else peak_rss() or 0
    return float(max(0, peak - before))
