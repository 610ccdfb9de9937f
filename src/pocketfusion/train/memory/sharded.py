"""FSDP2: weights, gradients, moments and average in shards over the processes, as accelerate's configuration says.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it. torch's `fully_shard` is called here, on CPUs as on GPUs
(accelerate shards on GPUs alone), a stage of the network at a time: robust training leaves out blocks inside one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from pocketfusion.errors import PocketfusionError
from pocketfusion.processes import process_state
from pocketfusion.recipe import TrainSettings

_ASKED = "ACCELERATE_USE_FSDP"


@cache
def fsdp_asked() -> Any:
    """accelerate's FSDP settings of this launch, or None. Raises PocketfusionError for those that cannot be."""
    if os.environ.get(_ASKED, "false").lower() != "true":
        return None
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise PocketfusionError("FSDP's first version shards no single weights: give accelerate --fsdp_version 2")
    if process_state().num_processes == 1:
        raise PocketfusionError(
            "FSDP shards over processes and there is one: give accelerate --num_processes, or no FSDP"
        )
    os.environ[_ASKED] = "false"  # what follows is ours: accelerate would wrap the network once more
    return plugin


def can_be_sharded(model: nn.Module) -> bool:
    """Not a network with a scalar weight, such as the judge's temperature, which FSDP2 cannot cut: it stays whole."""
    return all(parameter.ndim for parameter in model.parameters())


def check_sharded(settings: TrainSettings) -> None:
    """Raises PocketfusionError for settings that cannot be sharded."""
    for name, value in (("optimizer", "adamw-8bit"), ("micro_batch", "auto")):
        if getattr(settings, name) == value:
            raise PocketfusionError(f"{name} {value} does not work with FSDP: choose one of the two")
    if settings.compile:
        raise PocketfusionError("compile does not work with FSDP here: choose one of the two")


def stages_of(model: nn.Module) -> Iterator[nn.Module]:
    """The stages of a UNet or an autoencoder."""
    for name, module in model.named_modules():
        parent, own = ["", *name.split(".")][-2:]
        if parent in ("down_blocks", "up_blocks") or own == "mid_block":
            yield module


def shard(model: nn.Module, plugin: Any, device: torch.device) -> None:
    """In place: parameters become DTensors, gathered for a stage's forward and backward pass alone.

    Raises PocketfusionError where torch's FSDP2 has not the inside that `gathered` and `make_whole` ask for.
    """
    if hasattr(model, "skip_list"):
        # FSDP2 hands a stage copies of lists: what it appends to one would be lost
        model.skip_list = deque  # type: ignore[assignment]
    mesh = init_device_mesh(device.type, (process_state().num_processes,))
    for module in (*stages_of(model), model):
        fully_shard(module, mesh=mesh, reshard_after_forward=bool(plugin.reshard_after_forward))
    _check_inside(model)


def _check_inside(model: Any) -> None:
    """torch has no public names for what calls of one process alone, and the way back from `fully_shard`, need."""
    try:
        state = model._get_fsdp_state()
        state._lazy_init()  # else the first call would: `gathered` may come before it
        _ = state._pre_forward_hook_handle, state._post_forward_hook_handle, type(model).__bases__[1]
        _ = state._comm_ctx.post_forward_order, [group._post_forward_indices for group in state._fsdp_param_groups]
    except (AttributeError, IndexError) as error:
        raise PocketfusionError(
            f"FSDP2 of torch {torch.__version__} is built otherwise than this was written for ({error}): train "
            "without FSDP, or install the torch that pyproject.toml names"
        ) from None


def _sharded(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes can call the network only together."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """While it lasts every process holds all weights and may call the network alone. Nothing for one not sharded."""
    parts = _sharded(model)
    for part in parts:
        part.reshard()  # the root keeps its weights after a forward pass; they may be of before
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()
            _forget_calls(part)


def _forget_calls(part: Any) -> None:
    """FSDP2 notes the order of calls, fetches by it in the next backward pass and only then forgets it: the calls of a
    process alone would make it fetch what the others do not."""
    state = part._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for group in state._fsdp_param_groups:
        group._post_forward_indices.clear()


@torch.no_grad()
def make_whole(model: nn.Module) -> None:
    """In place, on all processes together: the network as it was before `shard`, with the weights of now."""
    if hasattr(model, "skip_list"):
        model.skip_list = list  # type: ignore[assignment]
    for module in _sharded(model):
        module.reshard()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                module._parameters[name] = nn.Parameter(parameter.full_tensor())
    for module in _sharded(model):
        state = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module.__class__ = type(module).__bases__[1]  # fully_shard puts FSDPModule before it
