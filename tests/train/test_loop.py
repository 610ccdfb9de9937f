"""The training loop: resumes to the sample, survives kill -9, stops on NaN, accumulates exactly."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loop_task import LineTask, RatioTask, settings
from safetensors.torch import load_file
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.train import batch, checkpoint
from pocketfusion.train.batch import BatchPlan
from pocketfusion.train.checkpoint import Average, update_ema
from pocketfusion.train.log import read_log
from pocketfusion.train.loop import DivergenceWatch, learning_rate_at, train
from pocketfusion.train.place import Goal
from processes import launch_two, run_two


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run) if "loss" in line]


def weights(result) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


class _Stop(Exception):
    pass


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path):
    whole = train(LineTask(), settings(), tmp_path / "whole", fingerprint={"a": 1})

    def stop(step, _):
        if step == 7:
            raise _Stop

    with pytest.raises(_Stop):
        train(LineTask(), settings(), tmp_path / "cut", fingerprint={"a": 1}, on_step=stop)
    resumed = train(LineTask(), settings(), tmp_path / "cut", fingerprint={"a": 1})
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.samples == 12 * 8 and resumed.finished


def test_kill_9_loses_at_most_one_checkpoint_interval(tmp_path):
    train(LineTask(), settings(), tmp_path / "whole", fingerprint={"a": 1})
    script = """
import os, signal, sys
from pathlib import Path
from loop_task import LineTask, settings
from processes import launch_two, run_two
from pocketfusion.train.loop import train
kill = lambda step, _: step == 8 and os.kill(os.getpid(), signal.SIGKILL)
train(LineTask(), settings(), Path(sys.argv[1]), fingerprint={"a": 1}, on_step=kill)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cut")], env=env, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    kept = sorted(p.name for p in (tmp_path / "cut" / "checkpoints").iterdir() if not p.name.startswith("."))
    assert kept == ["step_00000003", "step_00000006"]
    train(LineTask(), settings(), tmp_path / "cut", fingerprint={"a": 1})
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    words = r"gradients of steps 8 to 12 are not finite \(the last loss is nan\).*step_00000006; lower learning_rate"
    with pytest.raises(PocketfusionError, match=words):
        train(LineTask(nan_at=7), settings(), tmp_path / "run", fingerprint={})
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step_00000003", "step_00000006"]
    saved = load_file(tmp_path / "run" / "checkpoints" / "step_00000006" / "model.safetensors")
    assert all(torch.isfinite(v).all() for v in saved.values())


@pytest.mark.parametrize("parts", [1, 4])
def test_infinite_gradients_of_a_finite_loss_are_skipped(tmp_path, parts):
    """Step 6, a checkpoint's, leaves weights, moments and their average as step 5 left them; so does the last."""
    task, wanted = LineTask(infinite_at=(5, 11)), settings(gradient_accumulation=parts, checkpoint_every=1)
    kept = {}

    def keep(step, figures):
        assert math.isfinite(figures["loss"])
        kept[step] = [p.detach().clone() for p in task.model.parameters()]

    result = train(task, wanted, tmp_path / "run", fingerprint={}, on_step=keep)
    assert all(torch.equal(*pair) for before in (5, 11) for pair in zip(kept[before], kept[before + 1], strict=True))
    assert not torch.equal(kept[6][0], kept[7][0])
    assert result.skipped == 2 and torch.isfinite(weights(result)).all()
    lines = [line for line in read_log(tmp_path / "run") if "held_out" not in line]
    assert [line.get("skipped") for line in lines] == [*[None] * 5, 1, *[None] * 5, 2]
    assert all(line["gradient_norm"] > 0 for line in lines if "skipped" not in line)
    last = tmp_path / "run" / "checkpoints" / "step_00000012"
    assert all(
        torch.isfinite(value).all() for file in last.glob("*.safetensors") for value in load_file(file).values()
    )
    again = train(LineTask(), wanted, tmp_path / "run", fingerprint={})
    assert again.skipped == 2 and again.figures == result.figures


def test_the_gradient_norm_is_that_of_the_whole_batch_before_it_is_clipped(tmp_path):
    task = LineTask()
    task.loss(task.model, task.plan.part(0, 0, 1))[0].backward()
    by_hand = math.hypot(*(p.grad.item() for p in task.model.parameters()))
    assert by_hand > 1
    for parts in (1, 2):
        train(LineTask(), settings(gradient_accumulation=parts), tmp_path / f"{parts}", fingerprint={})
        assert read_log(tmp_path / f"{parts}")[0]["gradient_norm"] == pytest.approx(by_hand, rel=1e-5)


def test_divergence_stops_and_keeps_a_checkpoint_from_before_it(tmp_path):
    longer = settings(steps=200, checkpoint_every=10, preview_every=500)
    with pytest.raises(PocketfusionError, match=r"loss became .* at step 80: .*step_00000060; lower learning_rate"):
        train(LineTask(blow_up_at=60), longer, tmp_path / "run", fingerprint={})


def test_one_bad_batch_is_no_divergence():
    watch = DivergenceWatch(factor=20, window=4)
    assert not any(watch.diverged(loss) for loss in (1.0, 0.9, 0.5, 0.4, 0.3, 500.0))
    assert watch.suspect
    assert not watch.diverged(0.3) and not watch.suspect
    assert [watch.diverged(500.0) for _ in range(4)] == [False, False, False, True]
    assert watch.diverged(float("inf"))


def test_max_minutes_stops_with_a_checkpoint_and_goes_on(tmp_path):
    first = train(LineTask(), settings(), tmp_path / "run", fingerprint={}, max_minutes=1e-9)
    assert first.steps == 0 and not first.finished
    assert train(LineTask(), settings(), tmp_path / "run", fingerprint={}).finished


def test_other_settings_are_refused_by_name(tmp_path):
    train(LineTask(), settings(), tmp_path / "run", fingerprint={"settings": 1, "data": 2})
    with pytest.raises(PocketfusionError, match="begun with another data:"):
        train(LineTask(), settings(), tmp_path / "run", fingerprint={"settings": 1, "data": 3})


def test_accumulation_equals_the_whole_batch(tmp_path):
    whole = train(LineTask(), settings(), tmp_path / "whole", fingerprint={})
    parts = train(LineTask(), settings(gradient_accumulation=4), tmp_path / "parts", fingerprint={})
    assert torch.allclose(weights(parts), weights(whole), atol=1e-5)
    assert np.allclose(losses(tmp_path / "parts"), losses(tmp_path / "whole"), rtol=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(PocketfusionError, match="batch_size 8 does not divide by 1 processes x 3"):
        train(LineTask(), settings(gradient_accumulation=3), tmp_path / "run", fingerprint={})


def test_a_damaged_checkpoint_is_named(tmp_path):
    train(LineTask(), settings(), tmp_path / "run", fingerprint={})
    file = tmp_path / "run" / "checkpoints" / "step_00000012" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(PocketfusionError, match="step_00000012 is damaged"):
        train(LineTask(), settings(), tmp_path / "run", fingerprint={})


def test_two_processes_equal_one(tmp_path):
    """Also where one of them has infinite gradients; each looks at its share of the held-out samples."""
    one = train(LineTask(infinite_at=(4, 9)), settings(), tmp_path / "one", fingerprint={})
    launch_two(Path(__file__).parent / "loop_task.py", tmp_path / "two", port=29571)
    two = load_file(tmp_path / "two" / "checkpoints" / "step_00000012" / "ema.safetensors")
    assert torch.allclose(torch.cat([two["weight"].flatten(), two["bias"]]), weights(one), atol=1e-5)
    assert np.allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    assert len(losses(tmp_path / "two")) == 10
    found = [[line["held_out"] for line in read_log(tmp_path / name) if "held_out" in line] for name in ("one", "two")]
    assert len(found[1]) == 3 and all(a == pytest.approx(b, rel=1e-4) for a, b in zip(*found, strict=True))
    assert [int((tmp_path / "two" / f"looked-{rank}").read_text()) for rank in (0, 1)] == [3 * 64, 3 * 36]
    # a loss that depends on means of the whole step, in two parts of each of the two processes
    ratio = train(RatioTask(), settings(), tmp_path / "ratio", fingerprint={})
    two = load_file(tmp_path / "two" / "ratio" / "checkpoints" / "step_00000012" / "ema.safetensors")
    assert torch.allclose(torch.cat([two["weight"].flatten(), two["bias"]]), weights(ratio), atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_loss_of_the_whole_steps_means_is_equal_in_parts(tmp_path, parts):
    one = train(RatioTask(), settings(), tmp_path / "one", fingerprint={})
    more = train(RatioTask(), settings(gradient_accumulation=parts), tmp_path / "more", fingerprint={})
    assert torch.allclose(weights(more), weights(one), atol=1e-5)
    assert np.allclose(losses(tmp_path / "more"), losses(tmp_path / "one"), rtol=1e-4)


def test_a_lost_process_is_told_of_and_the_run_goes_on(tmp_path):
    done = run_two(Path(__file__).parent / "loop_task.py", tmp_path / "run", 8, port=29573)
    assert done.returncode != 0 and "a process of the 2 has died or was stopped (this is number 0)" in done.stderr
    assert "run the same command again, and it goes on from the newest checkpoint" in done.stderr
    resumed = train(LineTask(infinite_at=(4, 9)), settings(), tmp_path / "run", fingerprint={})
    whole = train(LineTask(infinite_at=(4, 9)), settings(), tmp_path / "whole", fingerprint={})
    assert np.allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-5)
    assert torch.allclose(weights(resumed), weights(whole), atol=1e-5)


def test_learning_rate():
    s = settings(steps=110, warmup_steps=10, learning_rate=1.0)
    assert learning_rate_at(0, s) == pytest.approx(0.1) and learning_rate_at(9, s) == pytest.approx(1.0)
    assert learning_rate_at(60, s) == pytest.approx(0.02 + 0.98 * 0.5)
    assert learning_rate_at(109, s) == pytest.approx(0.02, abs=1e-3)
    assert learning_rate_at(110, s) == learning_rate_at(0, s)  # beyond its steps the schedule begins again
    constant = settings(warmup_steps=0, schedule="constant", learning_rate=0.5)
    assert learning_rate_at(11, constant) == 0.5


def test_ema_by_hand():
    average, live = [torch.tensor([1.0])], [torch.tensor([3.0])]
    update_ema(average, live, 0.9, step=1)  # warm-up: decay 2/11
    assert average[0].item() == pytest.approx(1 * 2 / 11 + 3 * 9 / 11)
    average = [torch.tensor([1.0])]
    update_ema(average, live, 0.9, step=10_000)
    assert average[0].item() == pytest.approx(0.9 + 0.3)


def test_every_sample_once_a_pass_and_shares_are_kept():
    plan = BatchPlan([(np.arange(10), 0.75), (np.arange(100, 104), 0.25)], 4, seed=1)
    seen = np.concatenate([plan.indices(step) for step in range(10)])
    assert sorted(seen[seen < 100]) == sorted([*range(10)] * 3) and (seen >= 100).sum() == 10
    assert sorted(seen[seen >= 100][:4]) == [100, 101, 102, 103]
    assert (plan.indices(3) == BatchPlan([(np.arange(10), 0.75), (np.arange(100, 104), 0.25)], 4, 1).indices(3)).all()


def test_another_seed_draws_other_samples_whatever_was_drawn_before():
    plan, pools = BatchPlan([(np.arange(10), 1.0)], 4, seed=1), [(np.arange(10), 1.0)]
    plan.indices(3)
    assert (plan.reseeded(2).indices(3) == BatchPlan(pools, 4, seed=2).indices(3)).all()
    assert (plan.reseeded(2).indices(3) != plan.indices(3)).any()
    assert torch.equal(plan.reseeded(2).part(0, 0, 1).randn(2), BatchPlan(pools, 4, seed=2).part(0, 0, 1).randn(2))
    with pytest.raises(AttributeError):
        plan.seed = 2


def test_parts_draw_what_the_whole_draws():
    plan = BatchPlan([(np.arange(50), 1.0)], 8, seed=1)
    whole, parts = plan.part(5, 0, 1), [plan.part(5, i, 4) for i in range(4)]
    assert (np.concatenate([p.indices for p in parts]) == whole.indices).all()
    assert torch.equal(torch.cat([p.randn(3) for p in parts]), whole.randn(3))
    assert torch.equal(torch.cat([p.randint(9) for p in parts]), whole.randint(9))


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_held_out_figures_are_the_same_bits_for_any_number_of_processes(monkeypatch, processes):
    values = torch.rand(101, 5, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(5, 2)

    def evaluate(rows):
        seen.append(len(rows))
        return model(values[rows]).detach()

    seen: list[int] = []
    whole = batch.shared(101, 2, evaluate)
    block_means = batch.shared(101, 2, lambda rows: model(values[rows]).detach().mean(0))
    assert torch.allclose(sum(block_means).float(), model(values).sum(0), rtol=1e-4)
    parts = []
    for index in range(processes):
        state = SimpleNamespace(process_index=index, num_processes=processes)
        monkeypatch.setattr(batch, "process_state", lambda state=state: state)
        parts.append(batch.shared(101, 2, evaluate))
    assert torch.equal(sum(parts), whole) and seen == [32, 32, 32, 5, *seen[4:]] and sum(seen) == 202
    assert torch.allclose(whole.float(), model(values))


def test_held_out_samples_are_spread_and_capped():
    assert batch.spread(np.arange(10, 20), 4).tolist() == [10, 12, 15, 17]
    assert batch.spread(np.arange(3), 4).tolist() == [0, 1, 2]


def test_log_and_pictures_are_there(tmp_path):
    train(LineTask(), settings(), tmp_path / "run", fingerprint={})
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("held_out" in line for line in lines) and all(math.isfinite(line.get("loss", 0)) for line in lines)
    assert (tmp_path / "run" / "loss.png").is_file()
    assert sorted(p.name for p in (tmp_path / "run" / "previews").iterdir()) == [
        f"step_{n:08d}.png" for n in (5, 10, 12)
    ]


def test_training_goes_on_by_whole_schedules_until_its_goal_is_met(tmp_path):
    short = train(LineTask(), settings(), tmp_path / "short", fingerprint={})
    first = short.figures["slope"]
    goal = Goal({"slope": first + 1e-4}, {}, up_to=48)
    result = train(LineTask(), settings(), tmp_path / "long", fingerprint={}, goal=goal)
    assert result.finished and result.steps in (24, 36, 48) and result.samples == result.steps * 8
    rates = [line["learning_rate"] for line in read_log(tmp_path / "long") if "loss" in line]
    assert rates[12:24] == rates[:12] and rates[11] < rates[2] / 5  # the schedule again, each ending low
    held_out = {line["step"]: line["held_out"]["slope"] for line in read_log(tmp_path / "long") if "held_out" in line}
    assert held_out[12] == pytest.approx(first, abs=1e-6) and {12, 24} <= set(held_out)
    assert all(not goal.met({"slope": held_out[step]}) for step in range(12, result.steps, 12))


def test_a_goal_out_of_reach_ends_at_its_limit_and_a_later_higher_one_goes_on(tmp_path):
    never = {"slope": 99.0}
    once = train(LineTask(), settings(), tmp_path / "run", fingerprint={}, goal=Goal(never, {}, up_to=24))
    assert once.steps == 24 and once.finished
    more = train(LineTask(), settings(), tmp_path / "run", fingerprint={}, goal=Goal(never, {}, up_to=36))
    whole = train(LineTask(), settings(), tmp_path / "whole", fingerprint={}, goal=Goal(never, {}, up_to=36))
    assert more.steps == whole.steps == 36 and torch.equal(weights(more), weights(whole))
    assert train(LineTask(), settings(), tmp_path / "run", fingerprint={}).steps == 36  # without a goal it stays


def test_training_on_for_a_goal_resumes_to_the_sample(tmp_path):
    goal = Goal({"slope": 99.0}, {}, up_to=36)
    whole = train(LineTask(), settings(), tmp_path / "whole", fingerprint={}, goal=goal)

    def stop(step, _):
        if step in stops:
            stops.remove(step)
            raise _Stop

    stops = [11, 12, 13, 24, 29]
    while stops:
        with pytest.raises(_Stop):
            train(LineTask(), settings(), tmp_path / "cut", fingerprint={}, goal=goal, on_step=stop)
    resumed = train(LineTask(), settings(), tmp_path / "cut", fingerprint={}, goal=goal)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and torch.equal(weights(resumed), weights(whole))


def test_what_breaks_off_a_run_waits_for_the_checkpoint_being_written(tmp_path, monkeypatch):
    written = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *a: (time.sleep(0.1), written(*a)))
    writer = checkpoint.CheckpointWriter(tmp_path, first=True, background=True, sharded=False)
    model = nn.Linear(1, 1)
    with pytest.raises(KeyboardInterrupt), writer.finishing():
        writer.save(3, model, Average(model.parameters()), torch.optim.AdamW(model.parameters()))
        assert checkpoint.latest_checkpoint(tmp_path) is None
        raise KeyboardInterrupt
    assert checkpoint.latest_checkpoint(tmp_path).name == "step_00000003"
