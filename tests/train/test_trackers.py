"""Figures and pictures of a run where people look: its log, and accelerate's trackers."""

from inspect import signature
from pathlib import Path

import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from loop_task import LineTask, settings
from typer.testing import CliRunner

from pocketfusion.cli import app, commands
from pocketfusion.cli.train_commands import shown_in
from pocketfusion.errors import PocketfusionError
from pocketfusion.recipe import load_recipe
from pocketfusion.train import log, place
from pocketfusion.train.log import read_log
from pocketfusion.train.loop import train


def test_the_log_says_how_fast_and_how_large_a_step_is(tmp_path, monkeypatch):
    result = train(LineTask(), settings(), tmp_path / "run", fingerprint={})
    lines = [line for line in read_log(tmp_path / "run") if "loss" in line]
    assert all(line["samples_per_second"] > 0 and line["memory_gb"] > 0.1 for line in lines)
    assert all("model_tflops" in line and "peak_share" not in line for line in lines)
    assert result.finished and ["model_flop_per_sample" in line for line in lines] == [True] + 11 * [False]
    meter = log.Meter(torch.device("cpu"), "bf16", 2)
    meter.flops.per_sample, meter.peak = 5e9, 0.5
    figures = meter.figures(100, 2.0)
    assert figures["samples_per_second"] == 50 and figures["model_tflops"] == 0.25
    assert figures["peak_share"] == 0.25  # of two devices


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA H100 PCIe", "bf16", 756.0),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA L40S", "bf16", 362.0),
        ("NVIDIA GeForce GTX 1080", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "no", None),
    ],
)
def test_the_peak_is_that_of_the_named_device_or_left_out(monkeypatch, name, precision, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert log.peak_tflops(torch.device("cuda"), precision) == peak


def test_trackers_are_told_everything(tmp_path, monkeypatch):
    said: list[tuple] = []

    class Notebook(tracking.GeneralTracker):
        name, requires_logging_directory = "tensorboard", False

        def __init__(self, run_name, **kwargs):
            super().__init__()
            said.append(("begun", run_name))

        @property
        def tracker(self):
            return None

        def store_init_configuration(self, values):
            said.append(("config", values))

        def log(self, values, step=None, **kwargs):
            said.append((step, values))

        def log_images(self, values, step=None, **kwargs):
            said.append((step, {name: value.shape for name, value in values.items()}))

        def finish(self):
            said.append(("finished", None))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Notebook)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr(place, "find_spec", lambda name: True)
    train(LineTask(), settings(log_with=("tensorboard",)), tmp_path / "run", fingerprint={})
    assert said[0] == ("begun", "pocketfusion") and said[-1] == ("finished", None)
    config = next(values for key, values in said if key == "config")
    assert config["batch_size"] == 8 and isinstance(config["betas"], str)
    first = next(values for key, values in said if key == 1)
    assert {"loss", "learning_rate", "samples_per_second", "memory_gb"} <= set(first)
    assert [key for key, values in said if values == {"preview": (1, 4, 4, 3)}] == [5, 10, 12]
    assert any("slope" in values for key, values in said if key == 12)
    assert (tmp_path / "run" / "log.jsonl").is_file() and (tmp_path / "run" / "loss.png").is_file()


def test_a_tracker_that_is_not_there_is_told_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(place, "find_spec", lambda name: None)
    with pytest.raises(PocketfusionError, match="the tracker comet_ml is not installed: pip install comet-ml"):
        train(LineTask(), settings(log_with=("comet_ml",)), tmp_path / "run", fingerprint={})
    with pytest.raises(PocketfusionError, match="there is no tracker 'wandbb': did you mean 'wandb'?"):
        place.check_trackers(["wandbb"])
    assert not (tmp_path / "run").exists()


def test_a_command_takes_trackers_in_place_of_the_recipes(tmp_path, monkeypatch):
    tiny_recipe = Path(__file__).parents[2] / "recipes" / "tiny.yaml"
    assert commands  # registers them
    training = {info.name: info.callback for info in app.registered_commands}
    training = {
        name: signature(call).parameters
        for name, call in training.items()
        if "max_minutes" in signature(call).parameters
    }
    assert [name for name, options in training.items() if "log_with" not in options] == ["evolve"]
    recipe = shown_in(load_recipe(tiny_recipe), ["tensorboard", "wandb"])
    kept = [section.train.log_with for _, section in recipe if hasattr(section, "train")]
    assert len(kept) > 8 and set(kept) == {("tensorboard", "wandb")}
    assert shown_in(load_recipe(tiny_recipe), None) == load_recipe(tiny_recipe)
    monkeypatch.setattr(place, "find_spec", lambda name: None)
    begun = ["to-v", "none", "--recipe", str(tiny_recipe), "--data", "none", "--out", str(tmp_path / "v")]
    for command in (begun, ["compress", str(tiny_recipe), str(tmp_path / "all")]):
        done = CliRunner().invoke(app, [*command, "--log-with", "tensorboard", "--log-with", "aim"])
        assert str(done.exception) == "the tracker tensorboard is not installed: pip install tensorboard"
    assert not list(tmp_path.iterdir())


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(LineTask(), settings(log_with=("tensorboard",)), tmp_path / "run", fingerprint={})
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "pocketfusion"))
    events.Reload()
    assert {"loss", "learning_rate", "slope"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 13))
    assert "preview" in events.Tags()["images"]
