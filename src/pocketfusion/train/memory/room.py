"""How much memory a stage's training takes, part by part, and which settings make it fit: arithmetic, nothing is run.

Weights, gradients, moments and averages are counted; what a forward and backward pass hold at once is followed through
torch's own operations on fake tensors (`step_bytes`), at the recipe's full size.
"""

from __future__ import annotations

import math
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pocketfusion.errors import PocketfusionError
from pocketfusion.recipe import Recipe, TrainSettings
from pocketfusion.train.memory.lean import MOMENT_BYTES, checkpoint_activations
from pocketfusion.train.memory.micro_batch import parts_of
from pocketfusion.train.memory.sharded import stages_of

_TEXT = {"minilm": 22_700_000}
_CLIP = 123_000_000  #: parameters of ViT-L/14's text encoder, which a folder's is taken for
CUDA_ITSELF = 0.6e9  #: context and libraries of a process on a GPU; an assumption


@dataclass(frozen=True)
class Network:
    """What is trained or asked: how to make it, what to call it with, its and its largest stage's parameters."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple]
    parameters: int
    stage: int

    @classmethod
    def of(cls, make: Callable[[], nn.Module], inputs: Callable[[int], tuple]) -> Network:
        """Counts the parameters on the meta device. Raises PocketfusionError for a network that cannot be made."""
        try:
            with torch.device("meta"):
                made = make()
        except (TypeError, ValueError, RuntimeError) as error:
            raise PocketfusionError(f"a network of the recipe cannot be made ({str(error).splitlines()[0]})") from None
        largest = max((sum(p.numel() for p in stage.parameters()) for stage in stages_of(made)), default=0)
        return cls(make, inputs, sum(p.numel() for p in made.parameters()), largest)


@dataclass(frozen=True)
class Work:
    """A stage's training: the student and the teacher, and the rows of each that a sample is on average.

    `teacher_in_fp32`: whatever the student is in. `others`: parameters of frozen networks that are there besides.
    """

    name: str
    train: TrainSettings
    student: Network
    rows: float = 1.0
    teacher: Network | None = None
    teacher_rows: float = 0.0
    teacher_in_fp32: bool = False
    others: int = 0


def works_of(recipe: Recipe) -> list[Work]:
    """Every stage that the recipe has a section for; the judges are left out, which are small.

    Students of distillation count as the recipe's own UNet: one that was made smaller takes less.
    """
    from diffusers import AutoencoderKL

    from pocketfusion.models.elastic_unet import ElasticUNet

    autoencoder, config = recipe.autoencoder.config, recipe.teacher.unet
    side = recipe.data.size // 2 ** (len(autoencoder.get("block_out_channels", (64,))) - 1)
    channels, width = autoencoder.get("latent_channels", 4), config.get("cross_attention_dim", 768)

    def latents(rows: int) -> tuple:
        states = torch.empty(rows, recipe.text.max_length, width)
        return torch.empty(rows, channels, side, side), torch.full((rows,), 500), states

    def pictures(rows: int) -> tuple:
        size = recipe.autoencoder.crop_size if recipe.autoencoder.crop_until >= 1 else None
        return (torch.empty(rows, 3, size or recipe.data.size, size or recipe.data.size),)

    text = _TEXT.get(recipe.text.source, _CLIP)
    unet = Network.of(lambda: ElasticUNet(**config), latents)
    vae = Network.of(lambda: AutoencoderKL(**autoencoder), pictures)
    guided = 2.0  # rows of a guided prediction
    found = []
    if recipe.autoencoder.train.steps > 1:  # a recipe for a checkpoint describes one that is not trained
        found.append(Work("autoencoder", recipe.autoencoder.train, vae))
    plain = {"teacher": recipe.teacher, "to_v": recipe.to_v, "elastic": recipe.elastic}
    for name, section in plain.items():
        if section is not None and section.train.steps > 1:
            found.append(Work(name, section.train, unet, others=vae.parameters + text))
    if recipe.recovery is not None:
        found.append(Work("recovery", recipe.recovery.train, unet, 1.0, unet, 1.0, others=vae.parameters + text))
    if (steps := recipe.step_distillation) is not None:
        own = 1 + steps.guidance_probability
        rows = own + (steps.original_share if steps.original_weight else 0)
        fp32 = steps.teacher_precision == "fp32"
        found.append(Work("step_distillation", steps.train, unet, rows, unet, own, fp32, vae.parameters + text))
    if (guidance := recipe.guidance) is not None:
        found.append(Work("guidance", guidance.train, unet, 1.0, unet, guided, others=vae.parameters + text))
    if (consistency := recipe.consistency) is not None:
        own = guided if consistency.guidance == "classifier-free" else 1.0
        fp32 = consistency.teacher_precision == "fp32"
        found.append(Work("consistency", consistency.train, unet, own, unet, guided, fp32, vae.parameters))
    return found


@dataclass(frozen=True)
class Room:
    """Bytes of a process, by what they are; `peak` is their sum."""

    micro_batch: int
    parts: dict[str, float]

    @property
    def peak(self) -> float:
        """All of it."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Planner:
    """Where a training shall run: `kind` cuda or cpu, so many processes, their states sharded (FSDP2) or not."""

    kind: str = "cuda"
    processes: int = 1
    sharded: bool = False

    def room(self, work: Work, train: TrainSettings | None = None, micro_batch: int | None = None) -> Room:
        """What the stage takes with `train` for its settings, or a part of so many samples.

        Raises PocketfusionError for a batch that does not divide.
        """
        train = train or work.train
        if micro_batch is None:
            micro_batch = train.batch_size // self.processes // parts_of(train, self.processes)
        bf16, count = train.mixed_precision == "bf16", work.student.parameters
        on = 1 / self.processes if self.sharded else 1.0
        several = self.processes > 1 or micro_batch * self.processes < train.batch_size
        parts = {
            "weights": 4.0 * count * on,
            "moments": MOMENT_BYTES[train.optimizer] * count * on,
            "EMA": 0.0 if self.kind == "cuda" and "ema" in train.offload else 4.0 * count * on,
        }
        if several:
            parts["gradients"] = 4.0 * count * on
        asked = 0.0
        if work.teacher is not None:
            size = (2.0 if train.teacher_weights == "bf16" else 4.0) * work.teacher.parameters
            away = self.kind == "cuda" and "teacher" in train.offload
            parts["teacher"] = 0.0 if away else size
            asked = (size if away else 0.0) + self._pass(
                work.teacher, work.teacher_rows * micro_batch, training=False, bf16=bf16 and not work.teacher_in_fp32
            )
        parts["other networks"] = 4.0 * work.others
        passes = self._pass(
            work.student,
            work.rows * micro_batch,
            bf16=bf16,
            again=train.gradient_checkpointing,
            gradients=several,
        )
        if self.sharded:  # the stage at work and the one fetched ahead are whole
            passes += 2 * 4.0 * work.student.stage
        parts["activations" if several else "activations, gradients"] = max(passes, asked)
        if self.kind == "cuda":
            parts["CUDA"] = CUDA_ITSELF
        return Room(micro_batch, {name: value for name, value in parts.items() if value})

    def largest(self, work: Work, train: TrainSettings, limit: float) -> Room | None:
        """The room of the largest part of a batch that fits into `limit` bytes; None if not even one sample does."""
        share = train.batch_size // self.processes
        sizes = [n for n in range(1, share + 1) if share % n == 0]
        fits = bisect_left(sizes, True, key=lambda size: self.room(work, train, size).peak > limit)
        return self.room(work, train, sizes[fits - 1]) if fits else None

    def _pass(
        self, network: Network, rows: float, *, training: bool = True, bf16: bool, again: bool = False, **how: bool
    ) -> float:
        given = {"train": training, "bf16": bf16, "for_cuda": self.kind == "cuda", **how}
        return _followed(network, math.ceil(rows), again, tuple(given.items()))


@cache
def _followed(network: Network, rows: int, again: bool, how: tuple) -> int:
    kind = dict(how)["for_cuda"]

    def prepare(made: Any) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        made.set_attn_processor(AttnProcessor2_0() if kind else AttnProcessor())

    return step_bytes(network.make, network.inputs, rows, prepare=prepare, again=again, **dict(how))


#: What makes a training smaller, in the order of what it costs: nothing, a third more time, precision.
LADDER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("as the recipe is", {}),
    ("EMA and teacher offloaded", {"offload": ("ema", "teacher")}),
    ("+ teacher_weights bf16", {"teacher_weights": "bf16"}),
    ("+ gradient_checkpointing", {"gradient_checkpointing": True}),
    ("+ optimizer adamw-8bit", {"optimizer": "adamw-8bit"}),
)


def ladder(planner: Planner, work: Work, limit: float) -> list[tuple[str, TrainSettings, Room | None]]:
    """Step by step down the ladder, each with the steps before it: settings, and the largest part that fits."""
    found, train = [], work.train
    for name, change in LADDER:
        if planner.sharded and change.get("optimizer"):
            continue
        train = train.model_copy(update=change)
        found.append((name, train, planner.largest(work, train, limit)))
    return found


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
