"""Bytes that torch's operations hold at once, counted without computing anything: on fake tensors, of any size."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pocketfusion.train.lean import checkpoint_activations


class LiveBytes(TorchDispatchMode):
    """While it lasts: `now`, the bytes of all tensors made in it that still live, and `peak`, the most there were.

    Those of `known` tensors, made before, are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts what the operation made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self.now += size
            self.peak = max(self.peak, self.now)
            self._seen[key] = weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        del self._seen[key]


class _NormsInFp32(TorchFunctionMode):
    """What CUDA's autocast does and the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm, F.softmax, torch.softmax):
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


def step_bytes(
    make: Callable[[], nn.Module],
    inputs: Callable[[int], tuple],
    rows: int,
    *,
    train: bool = True,
    bf16: bool = False,
    for_cuda: bool = False,
    gradients: bool = False,
    again: bool = False,
    prepare: Callable[[Any], None] = lambda network: None,
) -> int:
    """The peak of a network's call with `rows` samples beside its weights, and of the backward pass in training.

    `make` gives the network and `inputs(rows)` what it is called with; `gradients`: they are there before, and not
    counted, as in every part of a batch but the first; `again`: activations are computed again. With autocast to
    `bf16` as a CPU or CUDA does it.
    """
    norms = _NormsInFp32 if bf16 and for_cuda else nullcontext
    with FakeTensorMode():
        network = make()
        prepare(network)
        if again:
            checkpoint_activations(network, norms)  # a backward pass leaves such modes
        network.train(train).requires_grad_(train)
        given = inputs(rows)
        known = [*network.parameters(), *network.buffers(), *(one for one in given if isinstance(one, torch.Tensor))]
        if gradients:
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            known += [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        with (
            LiveBytes(known) as live,
            norms(),
            torch.set_grad_enabled(train),
        ):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                found = network(*given)
                found = found.sample if hasattr(found, "sample") else found
                found = found[0] if isinstance(found, tuple) else found
                loss = found.float().square().mean()
            if train:
                del found
                loss.backward()
        return live.peak
