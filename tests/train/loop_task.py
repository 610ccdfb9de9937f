"""A task of milliseconds for the loop's tests: fit a line to points drawn with the step's own random numbers."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from pocketfusion.processes import mean_over_processes
from pocketfusion.recipe import TrainSettings
from pocketfusion.train.batch import Batch, BatchPlan, shared
from pocketfusion.train.loop import train


def settings(**changes) -> TrainSettings:
    values = {"steps": 12, "batch_size": 8, "learning_rate": 0.05, "warmup_steps": 2, "ema_decay": 0.9}
    values |= {"mixed_precision": "no", "checkpoint_every": 3, "preview_every": 5, "seed": 3}
    return TrainSettings(**{**values, **changes})


class LineTask:
    """y = 2 x + index / 10, plus noise; the last part of the steps `infinite_at` (from 0) has infinite gradients."""

    def __init__(self, nan_at: int | None = None, blow_up_at: int | None = None, infinite_at: tuple[int, ...] = ()):
        torch.manual_seed(0)
        self.infinite_at, self.looked = infinite_at, 0
        self.model, self.nan_at, self.blow_up_at, self.calls = nn.Linear(1, 1), nan_at, blow_up_at, 0
        self.plan = BatchPlan([(np.arange(30), 1.0)], 8, seed=3)

    def to(self, device: torch.device) -> None:
        pass

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        x = batch.randn(1)
        y = 2 * x + torch.from_numpy(batch.indices)[:, None].float() / 10 + 0.1 * batch.randn(1)
        self.calls += 1
        bad = float("nan") if self.nan_at is not None and self.calls > self.nan_at else 1.0
        if self.blow_up_at is not None and self.calls > self.blow_up_at:
            bad = 1e4
        given = model(x)
        loss = (given - y).square().mean() * bad
        if batch.step in self.infinite_at and batch.start + len(batch.indices) == batch.total:
            loss = loss + (given - given.detach()).sqrt().sum()  # nothing, but of infinite slope
        return loss, {}

    def preview(self, model: nn.Module) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def validate(self, model: nn.Module) -> dict[str, float]:
        def errors(rows: torch.Tensor) -> torch.Tensor:
            self.looked += len(rows)
            x = rows[:, None] / 100
            return (model(x) - 2 * x).square()

        return {"slope": model.weight.item(), "error": shared(100, 1, errors).mean().item()}


class RatioTask(LineTask):
    """A loss whose second half is scaled to the size of its first, as step distillation's dynamic scaling does."""

    def halves(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        x = batch.randn(1)
        y = 2 * x + torch.from_numpy(batch.indices)[:, None].float() / 10
        return torch.stack([(model(x) - y).square().mean(), model(x + 1).abs().mean()])

    def means(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self.halves(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        one, two = self.halves(model, batch)
        means = batch.means
        if means is None:
            means = mean_over_processes(torch.stack([one, two]).detach())
        return one + means[0] / means[1] * two, {}


if __name__ == "__main__":

    def kill(step: int, _: dict) -> None:
        """With a second argument, process 1 dies at that step without a word."""
        if sys.argv[2:] == [str(step)] and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    class Stop(Exception):
        pass

    def stop(step: int, _: dict) -> None:
        """Leaves a run that goes on from its checkpoint of step 6."""
        if step == 8:
            raise Stop

    run, task = Path(sys.argv[1]), LineTask(infinite_at=(4, 9))
    train(task, settings(), run, fingerprint={}, on_step=kill)
    (run / f"looked-{os.environ['RANK']}").write_text(str(task.looked))
    if sys.argv[2:] == ["cut"]:
        with suppress(Stop):
            train(LineTask(infinite_at=(4, 9)), settings(), run / "cut", fingerprint={}, on_step=stop)
    else:
        train(RatioTask(), settings(gradient_accumulation=2), run / "ratio", fingerprint={})
