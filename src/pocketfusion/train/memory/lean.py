"""What keeps a step small: activations computed again, moments in 8 bits, teachers in bf16 or out of the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.recipe import TrainSettings

#: What `make_optimizer`'s moments take, bytes a parameter: two of 4, or of 1 with a scale each for a block of 256.
MOMENT_BYTES = {"adamw": 8.0, "adamw-8bit": 2.0 + 8 / 256}


def checkpoint_activations(model: nn.Module, recomputing: Callable[[], AbstractContextManager] = nullcontext) -> None:
    """Lets diffusers' blocks and ours keep their inputs alone and compute the rest again in the backward pass.

    `recomputing` is the context of that. Exact (Chen et al., arXiv 1604.06174). Raises PocketfusionError for a model
    without such blocks.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), recomputing()

    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if not blocks:
        raise PocketfusionError(
            f"gradient_checkpointing: a {type(model).__name__} has no block that can do without its activations: set "
            "it to false"
        )
    for block in blocks:
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        block.gradient_checkpointing = True


def make_optimizer(parameters: Iterable[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """Fused AdamW, or torchao's with moments in 8 bits by blocks of 256 (Dettmers et al., arXiv 2110.02861)."""
    given: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **given)
    with quiet():  # its GPU extensions are not there on a CPU
        try:
            from torchao.optim import AdamW8bit
        except ImportError:
            raise PocketfusionError("optimizer adamw-8bit needs torchao: pip install torchao") from None

    class Eager(AdamW8bit):
        """torchao compiles its update for every shape: minutes of a C++ compiler on a CPU, for nothing."""

        @torch.compiler.set_stance("force_eager")
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    parameters = list(parameters)
    return (Eager if parameters[0].device.type == "cpu" else AdamW8bit)(parameters, **given)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For all groups; torchao keeps it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class InputsAs:
    """A forward pre-hook: latents, states and conditions in the network's type; timesteps [B] as they are.

    States that come again are the same tensor again, which `remembered_text` knows them by.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._states: tuple[torch.Tensor, torch.Tensor] | None = None

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim < 2:
            return value
        if value.ndim != 3:
            return value.to(self.dtype)
        if self._states is None or self._states[0] is not value:
            self._states = value, value.to(self.dtype)
        return self._states[1]

    def __call__(self, module: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """What the network is called with."""
        return tuple(map(self._cast, given)), {name: self._cast(value) for name, value in named.items()}


def teachers_of(task: Any) -> tuple[nn.Module, ...]:
    """The frozen UNets that a task's loss asks."""
    return tuple(getattr(task, "teachers", ()))


def slim_teachers(task: Any, settings: TrainSettings) -> None:
    """Their weights in bf16 if the settings say so; before they are moved to a device."""
    for teacher in teachers_of(task) if settings.teacher_weights == "bf16" else ():
        teacher.to(torch.bfloat16)
        teacher.register_forward_pre_hook(InputsAs(torch.bfloat16), with_kwargs=True)


def offload_teachers(task: Any, student: nn.Module, settings: TrainSettings, device: torch.device) -> None:
    """Teachers wait in the CPU's memory, come when they are called, and go when the student is, to be trained."""
    if "teacher" not in settings.offload or device.type == "cpu":
        return
    from accelerate import cpu_offload_with_hook

    away = [cpu_offload_with_hook(teacher.cpu(), device)[1] for teacher in teachers_of(task)]

    def send_away(module: nn.Module, given: tuple) -> None:
        if torch.is_grad_enabled():
            for hook in away:
                hook.offload()

    student.register_forward_pre_hook(send_away)
