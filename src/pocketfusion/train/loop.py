"""The one training loop: accelerate, AdamW, EMA, schedules, checkpoints that resume to the sample, divergence."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from PIL import Image
from torch import nn
from torch.distributed.tensor import DTensor

from pocketfusion.artefact import atomic_file, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.locks import hold
from pocketfusion.processes import lost_processes_are_told, mean_over_processes
from pocketfusion.recipe import TrainSettings
from pocketfusion.train.batch import Batch, BatchPlan
from pocketfusion.train.checkpoint import Average, CheckpointWriter, latest_checkpoint, load_checkpoint
from pocketfusion.train.log import Meter, Trackers, TrainLog
from pocketfusion.train.memory.lean import (
    checkpoint_activations,
    make_optimizer,
    offload_teachers,
    set_learning_rate,
    slim_teachers,
)
from pocketfusion.train.memory.micro_batch import parts_by_trial, parts_of
from pocketfusion.train.memory.sharded import can_be_sharded, check_sharded, fsdp_asked, gathered, make_whole, shard
from pocketfusion.train.place import Goal, check_trackers


class Task(Protocol):
    """What a stage gives to the loop.

    A task that learns from frozen UNets has them in `teachers`, so that the settings can say where they lie and in
    which type. One whose loss leaves some parameters without a gradient also has `unused_parameters = True`. One whose
    loss is no mean over samples, but depends on means over the whole step (as a ratio of two losses does), also has
    `means(model, batch)`: these means of a part, 1-d, or None if its settings need none. See `means_of_step`. One that
    looks at other things in the course of training has `reached(step)`, told before `validate` and `preview`.
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
        """Held-out figures; every process calls it, so that they can share the work (`train.batch.shared`)."""


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
    check_trackers(settings.log_with)
    asked = fsdp_asked()
    plugin = asked if can_be_sharded(task.model) else None
    if plugin is not None:
        check_sharded(settings)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=settings.mixed_precision,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                find_unused_parameters=getattr(task, "unused_parameters", False),
                gradient_as_bucket_view=True,  # else every gradient is there twice
            )
        ],
        log_with=list(settings.log_with) or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / "trackers")),
    )
    device = accelerator.device
    accumulated = parts_of(settings, accelerator.num_processes)
    begin_run(run, fingerprint, accelerator)
    slim_teachers(task, settings)
    raw = task.model.to(device)
    task.to(device)
    offload_teachers(task, raw, settings, device)
    meter = Meter(device, settings.mixed_precision, accelerator.num_processes)
    if settings.gradient_checkpointing:
        checkpoint_activations(raw, meter.flops.recomputing)
    if settings.micro_batch == "auto":
        accumulated = parts_by_trial(task, raw, settings, accelerator.autocast, device)
    accelerator.gradient_accumulation_steps = accumulated
    parts = accelerator.num_processes * accumulated
    if plugin is not None:
        shard(raw, plugin, device)
    parameters = list(raw.parameters())
    optimizer = make_optimizer(parameters, settings)
    average = Average(parameters, on_cpu="ema" in settings.offload)
    checkpoint = latest_checkpoint(run / "checkpoints")
    step = load_checkpoint(checkpoint, raw, average, optimizer) if checkpoint else first_step
    prepared = accelerator.prepare(optimizer)
    model = raw if plugin is not None else accelerator.prepare(raw)
    if settings.compile:
        model = torch.compile(model)
    log = TrainLog(run, step, settings, meter, enabled=accelerator.is_main_process)
    trackers = Trackers(accelerator, run, settings.model_dump(mode="json"), settings.log_with)
    writer = CheckpointWriter(
        run / "checkpoints",
        first=accelerator.is_main_process,
        background=device.type != "cpu" or accelerator.num_processes > 1,
        sharded=plugin is not None,
    )
    watch = DivergenceWatch()
    started, saved_at, figures, looked_at = time.monotonic(), step, dict[str, float](), -1
    end = settings.steps * max(1, -(-step // settings.steps))  # of the schedule that `step` is in
    deadline = started + 60 * max_minutes if max_minutes else math.inf

    def save() -> None:
        nonlocal saved_at
        if saved_at != step:
            log.flush()  # a kill right after the checkpoint must not lose lines before it
            writer.save(step, raw, average, optimizer)
        saved_at = step

    def look() -> None:
        nonlocal figures, looked_at
        if looked_at == step:
            return
        if hasattr(task, "reached"):
            task.reached(step)
        with average.in_place(), gathered(raw):
            raw.eval()
            figures = task.validate(raw)
            if accelerator.is_main_process:
                with atomic_file(log.preview_path(step)) as partial:
                    task.preview(raw).save(partial)
                trackers.picture(step, log.preview_path(step))
            raw.train()
        looked_at = step
        log.held_out(step, figures)
        trackers.log(step, figures)

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
    with lost_processes_are_told("and it goes on from the newest checkpoint"), log.progress(), writer.finishing():
        while goes_on():
            set_learning_rate(optimizer, learning_rate_at(step, settings))
            loss_sum, gradient_norm = 0.0, math.nan
            logged: dict[str, float] = {}
            own = range(accelerator.process_index, parts, accelerator.num_processes)
            with accelerator.autocast():  # one of its own: the casts that it keeps have no gradients
                means = means_of_step(task, model, step, own, parts)
            for part in own:
                batch = task.plan.part(step, part, parts)
                batch.means = means
                with accelerator.accumulate(model), ExitStack() as counting:
                    if meter.flops.per_sample is None:
                        counting.enter_context(meter.flops.counting(len(batch.indices), settings.compile))
                    with accelerator.autocast():
                        loss, logged = task.loss(model, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:  # they are the processes' mean from here on
                        gradient_norm = clipped(parameters, settings.max_grad_norm)
                        if math.isfinite(gradient_norm):
                            prepared.step()
                    prepared.zero_grad()
                loss_sum += accelerator.reduce(loss.detach(), "mean").item() / accumulated
            step += 1
            if watch.diverged(loss_sum, gradient_norm):
                writer.wait()
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
                average.update(settings.ema_decay, step)
            line = log.add(step, loss_sum, learning_rate_at(step - 1, settings), gradient_norm, logged)
            trackers.log(step, {name: value for name, value in line.items() if name != "step"})
            if on_step:
                on_step(step, {"loss": loss_sum, **logged})
            if step % settings.checkpoint_every == 0 and not watch.suspect:
                save()
            if step % settings.preview_every == 0 and step < end:
                look()
        save()
        look()
        writer.wait()
        accelerator.wait_for_everyone()
    trackers.finish()
    average.give()
    if plugin is not None:
        make_whole(raw)
    raw.eval()
    finished, samples = step >= end, step * settings.batch_size
    return TrainResult(raw, step, samples, log.seconds, finished, figures, log.skipped)


def clipped(parameters: Sequence[nn.Parameter], most: float) -> float:
    """Scales the gradients to a norm of at most `most`, and gives the norm from before, over all shards."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


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


class DivergenceWatch:
    """Compares the mean of the last `window` losses with the lowest such mean since the run (re)started.

    `suspect` is true as soon as one loss is `factor` times that lowest mean, or a step was skipped because its
    gradients were not finite: no checkpoint should be written then. `skipped` counts such steps in a row.
    """

    def __init__(self, factor: float = 20.0, window: int = 20, patience: int = 5):
        self.factor, self.patience, self.lowest = factor, patience, math.inf
        self.suspect, self.skipped = False, 0
        self._last: deque[float] = deque(maxlen=window)

    def diverged(self, loss: float, gradient_norm: float = 0.0) -> bool:
        """Takes a step's loss and gradient norm; true if `patience` steps in a row had no finite gradients, a loss is
        not finite though its gradients are, or a whole window has stayed far above the lowest."""
        if not math.isfinite(gradient_norm):
            self.suspect, self.skipped = True, self.skipped + 1
            return self.skipped >= self.patience
        self.skipped = 0
        if not math.isfinite(loss):
            return True
        self.suspect = loss > self.factor * self.lowest
        self._last.append(loss)
        if len(self._last) < (self._last.maxlen or 0):
            return False
        mean = sum(self._last) / len(self._last)
        self.lowest = min(self.lowest, mean)
        return min(self._last) > self.factor * self.lowest
