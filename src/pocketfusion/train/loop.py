"""The one training loop: accelerate, AdamW, EMA, schedules, checkpoints that resume to the sample."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import nn

from pocketfusion.artefact import atomic_file, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.locks import hold
from pocketfusion.processes import lost_processes_are_told, mean_over_processes
from pocketfusion.recipe import TrainSettings
from pocketfusion.train.batch import Batch, BatchPlan
from pocketfusion.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from pocketfusion.train.divergence import DivergenceWatch
from pocketfusion.train.log import TrainLog
from pocketfusion.train.place import Goal


class Task(Protocol):
    """What a stage gives to the loop.

    A task whose loss leaves some parameters without a gradient also has `unused_parameters = True`. One whose loss is
    no mean over samples, but depends on means over the whole step (as a ratio of two losses does), also has
    `means(model, batch)`: these means of a part, 1-d, or None if its settings need none. See `means_of_step`.
    """

    plan: BatchPlan

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    def to(self, device: torch.device) -> None:
        """Moves whatever the loss needs beside the model to `device`."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean loss over the batch (scalar) and figures to log."""

    def preview(self, model: nn.Module) -> Image.Image:
        """A picture of what the model does now."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures; every process calls it, so that they can share the work (`train.held_out.shared`)."""


@dataclass(frozen=True)
class TrainResult:
    """Where training stands: `model` holds the EMA weights."""

    model: nn.Module
    steps: int
    samples: int
    seconds: float
    finished: bool
    figures: dict[str, float]
    skipped: int = 0  #: steps whose gradients were not finite


def learning_rate_at(step: int, settings: TrainSettings) -> float:
    """Linear warm-up to `learning_rate`, then constant or a cosine to a fiftieth of it at the last step.

    Training on beyond `steps` goes through warm-up and cosine again (warm restarts, arXiv 1608.03983), so that every
    multiple of `steps` ends at the low rate that held-out figures are best at.
    """
    if settings.schedule == "cosine":
        step %= settings.steps
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    floor = 0.02
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def update_ema(average: list[torch.Tensor], parameters: Sequence[torch.Tensor], decay: float, step: int) -> None:
    """Exponential moving average with warm-up: decay is at most (1 + step) / (10 + step)."""
    torch._foreach_lerp_(average, list(parameters), 1 - min(decay, (1 + step) / (10 + step)))


def train(
    task: Task,
    settings: TrainSettings,
    run: Path,
    *,
    fingerprint: dict,
    max_minutes: float | None = None,
    first_step: int = 0,
    goal: Goal | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Trains `task.model` in the run folder `run`, from its newest checkpoint if it has one, else from `first_step`.

    `fingerprint` (settings and input hashes) must equal the one the run was begun with. Stops after `max_minutes`
    with a checkpoint. Short of `goal` after `settings.steps`, it goes on for as many again. The samples and random
    numbers of a step depend on the seed and the step alone. A step whose gradient norm is not finite leaves weights,
    moments and EMA as they are.
    Raises PocketfusionError on a run begun with other settings, a batch that does not divide, several such steps in a
    row, or a loss that is not finite or diverges (the last good checkpoint stays).
    """
    parallel = DistributedDataParallelKwargs(find_unused_parameters=getattr(task, "unused_parameters", False))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation,
        kwargs_handlers=[parallel],
    )
    parts = accelerator.num_processes * settings.gradient_accumulation
    if settings.batch_size % parts:
        raise PocketfusionError(
            f"batch_size {settings.batch_size} does not divide by {accelerator.num_processes} processes "
            f"x {settings.gradient_accumulation} accumulation parts: choose a multiple of {parts}"
        )
    begin_run(run, fingerprint, accelerator)
    raw = task.model.to(accelerator.device)
    task.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        raw.parameters(),
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    ema = [p.detach().clone() for p in raw.parameters()]
    parameters = list(raw.parameters())
    checkpoint = latest_checkpoint(run / "checkpoints")
    step = load_checkpoint(checkpoint, raw, ema, optimizer) if checkpoint else first_step
    model, prepared = accelerator.prepare(raw, optimizer)
    if settings.compile:
        model = torch.compile(model)
    log = TrainLog(run, step, settings, enabled=accelerator.is_main_process)
    watch = DivergenceWatch()
    started, saved_at, figures, looked_at = time.monotonic(), step, dict[str, float](), -1
    end = settings.steps * max(1, -(-step // settings.steps))  # of the schedule that `step` is in
    deadline = started + 60 * max_minutes if max_minutes else math.inf

    def save() -> None:
        nonlocal saved_at
        if accelerator.is_main_process and saved_at != step:
            log.flush()  # a kill right after the checkpoint must not lose lines before it
            save_checkpoint(run / "checkpoints", step, raw, ema, optimizer)
        saved_at = step

    def look() -> None:
        nonlocal figures, looked_at
        if looked_at == step:
            return
        with swapped(parameters, ema):
            raw.eval()
            figures = task.validate(raw)
            if accelerator.is_main_process:
                with atomic_file(log.preview_path(step)) as partial:
                    task.preview(raw).save(partial)
            raw.train()
        looked_at = step
        log.held_out(step, figures)

    def goes_on() -> bool:
        nonlocal end
        if step == end and goal is not None and end < goal.up_to:
            save()
            look()
            short = [not goal.met(figures)]
            broadcast_object_list(short)  # the first process's figures decide
            if short[0]:
                end += settings.steps
                log.prolong(end)
        return step < end and not time_is_up()

    def time_is_up() -> bool:
        if deadline == math.inf:
            return False
        over = torch.tensor(float(time.monotonic() >= deadline), device=accelerator.device)
        return bool(accelerator.reduce(over, "sum") > 0)  # clocks differ, and all must leave the loop together

    raw.train()
    with lost_processes_are_told("and it goes on from the newest checkpoint"), log.progress():
        while goes_on():
            for group in prepared.param_groups:
                group["lr"] = learning_rate_at(step, settings)
            loss_sum, gradient_norm = 0.0, math.nan
            logged: dict[str, float] = {}
            own = range(accelerator.process_index, parts, accelerator.num_processes)
            with accelerator.autocast():  # one of its own: the casts that it keeps have no gradients
                means = means_of_step(task, model, step, own, parts)
            for part in own:
                batch = task.plan.part(step, part, parts)
                batch.means = means
                with accelerator.accumulate(model):
                    with accelerator.autocast():
                        loss, logged = task.loss(model, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:  # they are the processes' mean from here on
                        gradient_norm = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm))
                        if math.isfinite(gradient_norm):
                            prepared.step()
                    prepared.zero_grad()
                loss_sum += accelerator.reduce(loss.detach(), "mean").item() / settings.gradient_accumulation
            step += 1
            if watch.diverged(loss_sum, gradient_norm):
                kept = latest_checkpoint(run / "checkpoints")
                what = f"the loss became {loss_sum:.3g} at step {step}"
                if watch.skipped:
                    since = step + 1 - watch.skipped
                    what = f"the gradients of steps {since} to {step} are not finite (the last loss is {loss_sum:.3g})"
                raise PocketfusionError(
                    f"{what}: training stopped and kept {kept or 'no checkpoint'}; lower learning_rate "
                    f"{settings.learning_rate:g} or check the data"
                )
            if not watch.skipped:
                update_ema(ema, parameters, settings.ema_decay, step)
            log.add(step, loss_sum, learning_rate_at(step - 1, settings), gradient_norm, logged)
            if on_step:
                on_step(step, {"loss": loss_sum, **logged})
            if step % settings.checkpoint_every == 0 and not watch.suspect:
                save()
            if step % settings.preview_every == 0 and step < end:
                look()
        save()
        look()
    accelerator.wait_for_everyone()
    with torch.no_grad():
        for parameter, average in zip(parameters, ema, strict=True):
            parameter.copy_(average)
    raw.eval()
    finished, samples = step >= end, step * settings.batch_size
    return TrainResult(raw, step, samples, log.seconds, finished, figures, log.skipped)


@torch.no_grad()
def means_of_step(task: Task, model: nn.Module, step: int, own: Sequence[int], parts: int) -> torch.Tensor | None:
    """`Task.means` over all parts of a step, of which `own` are this process's; None where the loss needs none.

    Where the step is one part a process the loss has its part's means already and `mean_over_processes` is enough, so
    this gives None. With accumulation it is a first pass over the parts without gradients: their gradients are then
    those of the whole batch at once, exactly, at the price of one more forward pass (a value of the step before would
    be free and not equal; the graphs of all parts at once are the memory that accumulation is to save).
    """
    if len(own) == 1 or not hasattr(task, "means"):
        return None
    found = [task.means(model, task.plan.part(step, part, parts)) for part in own]
    return None if found[0] is None else mean_over_processes(torch.stack(found).mean(0))


def begin_run(run: Path, fingerprint: dict, accelerator: Accelerator) -> None:
    """Creates the run folder, or checks that it was begun with the same settings and inputs; locks it."""
    hold(run)
    state = run / "run.json"
    if state.is_file():
        before = json.loads(state.read_text())
        now = json.loads(json.dumps(fingerprint))
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if differing:
            raise PocketfusionError(
                f"the run in {run} was begun with another {', '.join(differing)}: delete it or choose another --run"
            )
    elif accelerator.is_main_process:
        write_json(state, fingerprint)
    accelerator.wait_for_everyone()


class swapped:
    """Context: the parameters hold the EMA weights; the live ones come back afterwards."""

    def __init__(self, parameters: list[nn.Parameter], ema: list[torch.Tensor]):
        self.parameters, self.ema = parameters, ema

    @torch.no_grad()
    def __enter__(self) -> None:
        self.live = [p.detach().clone() for p in self.parameters]
        for parameter, average in zip(self.parameters, self.ema, strict=True):
            parameter.copy_(average)

    @torch.no_grad()
    def __exit__(self, *exc: object) -> None:
        for parameter, live in zip(self.parameters, self.live, strict=True):
            parameter.copy_(live)
