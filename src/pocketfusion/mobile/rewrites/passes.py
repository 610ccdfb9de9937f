"""What a rewrite is: a named pass that replaces submodules by equal ones in a form that a device takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from pocketfusion.mobile.devices import Limits

Reason = Literal["unsupported op", "memory", "fp16 range", "speed"]


@dataclass(frozen=True)
class Rewrite:
    """One pass. Called with a module and a device's limits, it replaces submodules in place and returns how many.

    A replacement stands at the original's path and gives the same numbers to 1e-5 of their scale in float32. Its
    parameters are the original's or views of them (`subpixel-upsample` has sums of them), and may also lie on `meta`.
    """

    name: str
    reason: Reason
    summary: str
    source: str
    apply: Callable[[nn.Module, Limits], int]

    def __call__(self, module: nn.Module, limits: Limits) -> int:
        return self.apply(module, limits)


def replace(module: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Sets every descendant for which `make` gives a replacement, and returns how many.

    `make` gets the children before their own children; what it gave is not entered.
    """
    count = 0
    for name, child in module.named_children():
        new = make(child)
        if new is None:
            count += replace(child, make)
        else:
            setattr(module, name, new)
            count += 1
    return count


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of `module`'s structure, in eval mode, with the very same parameters and buffers."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared).eval()


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module`'s structure on `meta`, for its shapes: no weight is copied."""
    shapes: dict[int, torch.Tensor] = {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    shapes |= {id(one): nn.Parameter(one.detach().to("meta"), requires_grad=False) for one in module.parameters()}
    return copy.deepcopy(module, shapes).eval()


def view(weight: torch.Tensor) -> nn.Parameter:
    """A parameter that shares the memory of `weight`, a slice or reshape of another one."""
    return nn.Parameter(weight.detach(), requires_grad=False)


def contiguous(module: nn.Module) -> nn.Module:
    """Copies, in place, the parameters that are not contiguous, such as a slice along a weight's input channels.

    litert-torch 0.10 copies such a weight and may free the copy before it is read: the file then holds garbage.
    """
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if not parameter.is_contiguous():
                setattr(child, name, view(parameter.contiguous()))
    return module
