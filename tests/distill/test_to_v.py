"""`to-v`: the turn from ε to v starts exactly, ends exactly, and is refused where there is nothing to turn."""

import json

import numpy as np
import pytest
import torch

from pocketfusion.data.sources import open_dataset
from pocketfusion.distill.ddim import NoiseSchedule, add_noise, v_from_noise, v_of
from pocketfusion.distill.to_v import ToVTask, turned_target
from pocketfusion.recipe import load_recipe
from pocketfusion.train.start import open_start


def test_the_turn_by_hand():
    x, noise, phi = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0), torch.tensor([np.pi / 3])
    assert turned_target(x, noise, phi, 0.0).item() == -1.0
    assert turned_target(x, noise, phi, 1.0).item() == pytest.approx(-0.5 - 2 * np.sin(np.pi / 3))
    assert turned_target(x, noise, phi, 0.5).item() == pytest.approx(-np.cos(np.pi / 6) - 2 * np.sin(np.pi / 6))


@pytest.fixture
def task(epsilon, tiny_recipe, tiny_data, tmp_path):
    recipe = load_recipe(tiny_recipe)
    start = open_start(epsilon, recipe, prediction_type="epsilon")
    made = ToVTask(recipe, recipe.to_v, open_dataset(tiny_data, 64), start)
    made.prepare(tmp_path, start.vae_hash, start.text.fingerprint, torch.device("cpu"))
    return made


def test_any_share_of_the_turn_determines_v(task):
    """v = (u − sin((1 − s) φ) z) / cos((1 − s) φ): at s = 0 the algebraic conversion, at s = 1 the output."""
    x, noise = torch.randn(8, 4, 2, 2), torch.randn(8, 4, 2, 2)
    schedule = NoiseSchedule(task.scheduler)
    times = torch.linspace(0, 900, 8)
    phi, at = schedule.angle(times).view(-1, 1, 1, 1), schedule.at(times, x)
    z = add_noise(x, noise, at)
    for share in (0.0, 0.3, 1.0):
        u = turned_target(x, noise, phi.flatten(), share)
        rest = (1 - share) * phi
        torch.testing.assert_close(
            (u - rest.sin() * z) / rest.cos(), v_of(x, noise, at).double(), rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close(v_from_noise(z, noise, at), v_of(x, noise, at), rtol=1e-3, atol=1e-3)


def test_the_first_loss_is_the_epsilon_models_and_the_last_is_l_ori(task):
    for step, target in ((0, lambda x, noise, at: noise), (3, v_of)):
        loss, logged = task.loss(task.model, task.plan.part(step, 0, 1))
        assert logged["share"] == step / 3
        again = task.plan.part(step, 0, 1)
        x, states = task.clean(again)
        times, noise = again.randint(1000), again.randn(*x.shape[1:])
        at = task.schedule.at(times, x)
        with torch.no_grad():
            prediction = task.model(add_noise(x, noise, at), times, states).sample
        expected = (prediction - target(x, noise, at)).square().mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_command_writes_a_v_model(epsilon, tiny_recipe, tiny_data, tmp_path, cli):
    arguments = ("to-v", epsilon, "--recipe", tiny_recipe, "--data", tiny_data)
    done = cli(*arguments, "--out", tmp_path / "v")
    assert done.returncode == 0, done.stderr
    scheduler = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    done = cli("to-v", tmp_path / "v", *arguments[2:], "--out", tmp_path / "again")
    assert done.returncode == 2 and "was trained with 'v_prediction'" in " ".join(done.stderr.split())
    step = ("distill-steps", tmp_path / "v", "--teacher", epsilon, *arguments[2:], "--out", tmp_path / "bad")
    done = cli(*step)
    assert done.returncode == 2
    assert "prediction_type (v_prediction and epsilon)" in " ".join(done.stderr.split())
