"""Every training stage in several processes, DDP and FSDP2, gives the losses and figures of one: `pytest -m slow`."""

from pathlib import Path

import numpy as np
import pytest
from loop_task import LineTask, settings
from stages_task import STAGES, run_stages

from pocketfusion.data.sources import open_dataset
from pocketfusion.folder import check_folder, read_provenance
from pocketfusion.recipe import load_recipe
from pocketfusion.train.log import read_log
from pocketfusion.train.loop import train
from processes import launch_two

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # on a busy core


@pytest.fixture(scope="module")
def alone(trained, epsilon, tiny_recipe, tiny_data, tmp_path_factory):
    """All stages in this process."""
    out = tmp_path_factory.mktemp("alone")
    run_stages(load_recipe(tiny_recipe), open_dataset(tiny_data, 64), trained, epsilon, out)
    return out


@pytest.mark.parametrize(("fsdp", "count", "port"), [(False, 2, 29591), (True, 2, 29592), (False, 4, 29593)])
def test_every_stage_equals_one_process(trained, epsilon, alone, tiny_recipe, tiny_data, tmp_path, fsdp, count, port):
    task = Path(__file__).parent / "stages_task.py"
    arguments = (task, tiny_recipe, tiny_data, trained, epsilon, tmp_path)
    launch_two(*arguments, port=port, fsdp=fsdp, count=count, seconds=1500)
    for name in STAGES:
        one, many = ([line for line in read_log(at / f"{name}.run")] for at in (alone, tmp_path))
        losses = [[line["loss"] for line in lines if "loss" in line] for lines in (one, many)]
        assert len(losses[0]) == 6 and np.allclose(*losses, rtol=5e-3), f"{name}: {losses}"
        looked = [[line["held_out"] for line in lines if "held_out" in line] for lines in (one, many)]
        assert looked[0] and all(a == pytest.approx(b, rel=0.02, abs=0.02) for a, b in zip(*looked, strict=True)), name
        made = read_provenance(tmp_path / name)
        assert made is not None and made.finished and made.stage == read_provenance(alone / name).stage
        if (tmp_path / name / "model_index.json").is_file():
            check_folder(tmp_path / name)
            configs = [(at / name / "unet" / "config.json").read_text() for at in (alone, tmp_path)]
            assert configs[0] == configs[1]


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_run_of_two_processes_goes_on_on_four(tmp_path, fsdp):
    """And on one, as test_sharded.py shows; the losses are those of one process from beginning to end."""
    task, port = Path(__file__).parent / "loop_task.py", 29594 + 2 * fsdp
    train(LineTask(infinite_at=(4, 9)), settings(), tmp_path / "one", fingerprint={})
    launch_two(task, tmp_path / "two", "cut", port=port, fsdp=fsdp)
    launch_two(task, tmp_path / "two" / "cut", port=port + 1, count=4)
    losses = [[x["loss"] for x in read_log(tmp_path / run) if "loss" in x] for run in ("one", "two/cut")]
    assert len(losses[1]) == 10 and np.allclose(*losses, rtol=1e-5)
