"""Several processes at work together (`accelerate launch`): who is who, and one clear sentence when one dies."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState

from pocketfusion.errors import PocketfusionError


def process_state(wait: timedelta = timedelta(hours=2)) -> PartialState:
    """This process among all of the run; on CPUs too, where accelerate finds the others only if it is told.

    `wait`: how long others may work alone at a barrier.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=wait)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes of the run, on each of them, where `values` are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        summed = values.to(process_state().device, copy=True)  # NCCL takes no tensor of the CPU's
        torch.distributed.all_reduce(summed)
        return summed.to(values.device)
    return values


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of `values` over all processes of the run, on each of them."""
    return sum_over_processes(values) / process_state().num_processes


def gathered_rows(values: torch.Tensor) -> torch.Tensor:
    """The rows [B, ...] of all processes in their order, on each of them; gradients go back to where they come from.

    A gradient is the sum of what the processes' losses ask: right for the mean of losses, which accelerate takes.
    """
    count = process_state().num_processes
    if count == 1:
        return values
    from torch.distributed import _functional_collectives as collectives

    world: Any = torch.distributed.group.WORLD
    return collectives.all_gather_tensor_autograd(values.contiguous(), 0, world)


@contextmanager
def lost_processes_are_told(what: str) -> Iterator[None]:
    """While several processes work together: if one dies, the others say so, say that `what` goes on, and end with 2.

    They learn of it from a broken connection or from the launcher's SIGTERM, whichever comes first.
    """
    state = process_state()
    if state.num_processes == 1:
        yield
        return
    sentence = (
        f"a process of the {state.num_processes} has died or was stopped (this is number {state.process_index}): "
        f"run the same command again, {what}"
    )

    def stop(number: int, frame: FrameType | None) -> None:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        sys.exit(2)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in ("Connection", "gloo", "NCCL", "socket", "peer")):
            raise
        raise PocketfusionError(sentence) from None
    finally:
        signal.signal(signal.SIGTERM, before)
