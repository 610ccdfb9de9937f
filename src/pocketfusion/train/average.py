"""The exponential moving average of the weights: where it lies, and how it takes their place for a look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What of a parameter this process holds, sharing its memory: all of it, or its shard under FSDP2."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


@torch.no_grad()
def update_ema(average: list[torch.Tensor], parameters: Sequence[torch.Tensor], decay: float, step: int) -> None:
    """Exponential moving average with warm-up: decay is at most (1 + step) / (10 + step)."""
    torch._foreach_lerp_(average, list(parameters), 1 - min(decay, (1 + step) / (10 + step)))


class Average:
    """One average a parameter, of this process's part of it; with `on_cpu` in the CPU's memory, for any device."""

    def __init__(self, parameters: Iterable[nn.Parameter], on_cpu: bool = False):
        self.parameters, self.on_cpu = list(parameters), on_cpu
        self.values = [own_part(p).to("cpu" if on_cpu else p.device, copy=True) for p in self.parameters]

    def update(self, decay: float, step: int) -> None:
        """`update_ema` with the weights of now; those on a GPU come to a CPU's average one by one."""
        live = [own_part(p) for p in self.parameters]
        if not self.on_cpu:
            update_ema(self.values, live, decay, step)
            return
        for value, now in zip(self.values, live, strict=True):
            update_ema([value], [now.cpu()], decay, step)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts the parameters hold the average, and the average the weights: nothing is held twice."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            part = own_part(parameter)
            kept = part.clone()
            part.copy_(value)
            value.copy_(kept)

    @torch.no_grad()
    def give(self) -> None:
        """The parameters become the average."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            own_part(parameter).copy_(value)
