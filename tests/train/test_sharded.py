"""FSDP2 on two CPU processes: one process's losses and weights, checkpoints that any number of them goes on from."""

import errno
import os
import re
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from loop_task import LineTask, settings
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pocketfusion.errors import PocketfusionError
from pocketfusion.train.checkpoint import CheckpointWriter
from pocketfusion.train.log import read_log
from pocketfusion.train.loop import train
from pocketfusion.train.memory import sharded
from processes import launch_two

TASK = Path(__file__).parent / "loop_task.py"


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_log(run) if "loss" in line]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    result = train(LineTask(infinite_at=(4, 9)), settings(), run, fingerprint={})
    return run, torch.cat([p.detach().flatten() for p in result.model.parameters()])


def test_shards_train_and_resume_as_one_process_does(one, tmp_path):
    """A whole run, and one that goes on from two processes' shards on one process, and on two from one's."""
    launch_two(TASK, tmp_path / "two", "cut", port=29583, fsdp=True)
    assert np.allclose(losses(tmp_path / "two"), losses(one[0]), rtol=1e-5) and len(losses(one[0])) == 10
    last = tmp_path / "two" / "checkpoints" / "step_00000012"
    parts = sorted(last.glob("*.safetensors"))
    assert len(parts) == 2 and sorted(p.name for p in last.iterdir())[-1] == "state.json"
    with safe_open(parts[0], "pt") as file:
        assert "model:weight" in file.keys() and "optimizer:exp_avg:weight" in file.keys()  # noqa: SIM118
    cut = tmp_path / "two" / "cut"
    assert max(p.name for p in (cut / "checkpoints").glob("step_*")) == "step_00000006"
    shutil.copytree(cut, tmp_path / "on-one")
    result = train(LineTask(infinite_at=(4, 9)), settings(), tmp_path / "on-one", fingerprint={})
    assert np.allclose(losses(tmp_path / "on-one"), losses(one[0]), rtol=1e-5)
    assert torch.allclose(torch.cat([p.detach().flatten() for p in result.model.parameters()]), one[1], atol=1e-5)


def test_the_inside_of_fsdp2_is_as_it_is_asked_for(monkeypatch):
    """torch's private names: where they vanish this says so, and `shard` before any training."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        x, model, plugin = torch.randn(5, 3), deepcopy(plain), SimpleNamespace(reshard_after_forward=True)
        try:
            sharded.shard(model, plugin, torch.device("cpu"))
            assert sharded.is_sharded(model) and isinstance(model[0].weight, DTensor)
            with sharded.gathered(model):
                assert torch.equal(model(x), plain(x))
            sharded.make_whole(model)
        except (AttributeError, IndexError, PocketfusionError) as error:
            pytest.fail(f"FSDP2 of torch {torch.__version__} is built otherwise: mend memory/sharded.py ({error})")
        assert type(model) is nn.Sequential and not sharded.is_sharded(model) and type(model[0].weight) is nn.Parameter
        assert torch.equal(model(x), plain(x)) and not (model._forward_hooks or model._forward_pre_hooks)
        monkeypatch.setattr(FSDPModule, "_get_fsdp_state", lambda module: SimpleNamespace(_lazy_init=lambda: None))
        with pytest.raises(
            PocketfusionError, match=f"FSDP2 of torch {re.escape(torch.__version__)} .*_pre_forward_hook"
        ):
            sharded.shard(deepcopy(plain), plugin, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def test_a_disk_full_of_shards_is_told_of_and_what_was_written_goes(tmp_path):
    def full():
        raise dcp.api.CheckpointException("write", {1: (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), None)})

    writer = CheckpointWriter(tmp_path, first=True, background=False, sharded=False)
    partial = tmp_path / ".writing-00000002"
    partial.mkdir()
    with pytest.raises(OSError, match="No space left") as found:
        writer._publish(SimpleNamespace(result=full), partial, 2)
    assert found.value.filename == str(tmp_path / "step_00000002") and not list(tmp_path.iterdir())


def test_what_cannot_be_sharded_is_said(monkeypatch):
    for change, words in (
        ({"optimizer": "adamw-8bit"}, "optimizer adamw-8bit does not work with FSDP"),
        ({"micro_batch": "auto"}, "micro_batch auto does not work with FSDP"),
        ({"compile": True}, "compile does not work with FSDP"),
    ):
        with pytest.raises(PocketfusionError, match=words):
            sharded.check_sharded(settings(**change))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(PocketfusionError, match="give accelerate --fsdp_version 2"):
        sharded.fsdp_asked.__wrapped__()
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(PocketfusionError, match="there is one: give accelerate --num_processes"):
        sharded.fsdp_asked.__wrapped__()
