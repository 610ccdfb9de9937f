"""What makes training smaller changes nothing that it should not, and is counted right before it is run."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from loop_task import LineTask, settings
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from pocketfusion.cli.train_commands import replaced
from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.recipe import StepDistillSettings, load_recipe
from pocketfusion.train.batch import BatchPlan
from pocketfusion.train.checkpoint import Average, update_ema
from pocketfusion.train.log import ModelFlops, read_log
from pocketfusion.train.loop import train
from pocketfusion.train.memory import micro_batch
from pocketfusion.train.memory.lean import InputsAs, checkpoint_activations, slim_teachers
from pocketfusion.train.memory.micro_batch import parts_of
from pocketfusion.train.memory.room import Planner, works_of


@pytest.fixture(scope="module")
def unet(tiny_recipe):
    """The tiny recipe's UNet and what it is called with, for 16 samples."""
    (work,) = [work for work in works_of(load_recipe(tiny_recipe)) if work.name == "teacher"]
    torch.manual_seed(0)
    network = work.student.make().train()
    network.set_attn_processor(AttnProcessor())
    x, t, states = work.student.inputs(16)
    return network, (torch.randn_like(x), t, torch.randn_like(states))


def gradients(network: nn.Module, given: tuple) -> list[torch.Tensor]:
    network.zero_grad(set_to_none=True)
    network(*given).sample.square().mean().backward()
    return [p.grad.clone() for p in network.parameters()]


def test_checkpointed_activations_give_the_same_gradients_and_count_as_no_work(unet):
    network, given = unet
    flops, again = ModelFlops(), ModelFlops()
    with flops.counting(16):
        plain = gradients(network, given)
    checkpoint_activations(network, again.recomputing)
    try:
        with again.counting(16):
            same = gradients(network, given)
    finally:
        for module in network.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False
    assert all(torch.equal(*pair) for pair in zip(plain, same, strict=True))
    assert flops.per_sample == again.per_sample > 1e6 and again._again > 0.2 * flops.per_sample
    with pytest.raises(PocketfusionError, match="a Linear has no block that can do without"):
        checkpoint_activations(nn.Linear(1, 1))


def test_model_flops_by_hand():
    layer, x, flops = nn.Linear(30, 50), torch.randn(8, 30), ModelFlops()
    with flops.counting(8):
        checkpoint(
            layer, x, use_reentrant=False, context_fn=lambda: (torch.enable_grad(), flops.recomputing())
        ).sum().backward()
    assert flops.per_sample == 2 * 2 * 30 * 50  # forward, and the weight's gradient; the input has none


class WideTask(LineTask):
    """4,096 weights, which torchao keeps in 8 bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Linear(64, 64)

    def loss(self, model, batch):
        x = batch.randn(64)
        return (model(x) - x.flip(1)).square().mean(), {}

    def validate(self, model):
        return {}


def test_moments_in_8_bits_train_and_resume_to_the_sample(tmp_path):
    small = settings(optimizer="adamw-8bit", learning_rate=0.01)
    whole = train(WideTask(), small, tmp_path / "whole", fingerprint={})

    class Stop(Exception):
        pass

    def stop(step, _):
        if step == 7:
            raise Stop

    with pytest.raises(Stop):
        train(WideTask(), small, tmp_path / "cut", fingerprint={}, on_step=stop)
    resumed = train(WideTask(), small, tmp_path / "cut", fingerprint={})
    assert torch.equal(resumed.model.weight, whole.model.weight)
    exact = train(WideTask(), settings(learning_rate=0.01), tmp_path / "exact", fingerprint={})
    moved = (exact.model.weight - WideTask().model.weight).norm()
    assert 0 < (whole.model.weight - exact.model.weight).norm() < 0.1 * moved
    files = [
        run / "checkpoints" / "step_00000012" / "optimizer.safetensors"
        for run in (tmp_path / "whole", tmp_path / "exact")
    ]
    assert files[0].stat().st_size < 0.4 * files[1].stat().st_size


def test_offloaded_averages_are_the_same_and_looking_holds_nothing_twice(tmp_path):
    plain = train(LineTask(), settings(), tmp_path / "plain", fingerprint={})
    away = train(LineTask(), settings(offload=("ema", "teacher")), tmp_path / "away", fingerprint={})
    assert torch.equal(plain.model.weight, away.model.weight) and plain.figures == away.figures
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0]))]
    average = Average(parameters, on_cpu=True)
    with torch.no_grad():
        parameters[0].add_(1)
    by_hand = [torch.tensor([1.0, 2.0])]
    update_ema(by_hand, [torch.tensor([2.0, 3.0])], 0.9, 1)
    average.update(0.9, 1)
    with pytest.raises(ZeroDivisionError), average.in_place():
        assert torch.equal(parameters[0], by_hand[0]) and average.values[0].tolist() == [2, 3]
        raise ZeroDivisionError
    assert parameters[0].tolist() == [2, 3] and torch.equal(average.values[0], by_hand[0])


def test_a_teacher_in_bf16_keeps_its_timesteps_and_knows_its_states_again(unet):
    network, (x, t, states) = unet
    with torch.no_grad():
        wanted = network(x, t + 499.0, states).sample
    teacher = ElasticUNet.from_config(network.config)
    teacher.load_state_dict(network.state_dict())
    teacher.set_attn_processor(AttnProcessor())
    slim_teachers(SimpleNamespace(teachers=(teacher,)), settings(teacher_weights="bf16"))
    assert teacher.dtype == torch.bfloat16
    with torch.no_grad():
        found = teacher(x, t + 499.0, states).sample
    assert ((found - wanted).norm() / wanted.norm()) < 0.03
    seen = InputsAs(torch.bfloat16)
    (one, times, given), named = seen(teacher, (x, t + 499.0, states), {"timestep_cond": torch.ones(2, 4)})
    assert times.dtype == torch.float32 and one.dtype == named["timestep_cond"].dtype == torch.bfloat16
    assert seen(teacher, (x, t, states), {})[0][2] is given


@pytest.mark.parametrize(
    ("micro", "processes", "parts"),
    [(8, 1, 3), (7, 1, 4), (8, 3, 1), (5, 2, 3), (1, 4, 6), (100, 2, 1), ("auto", 2, 1), (None, 2, 2)],
)
def test_a_micro_batch_is_at_most_what_was_asked_for_any_number_of_processes(micro, processes, parts):
    asked = settings(batch_size=24, micro_batch=micro, gradient_accumulation=2)
    assert parts_of(asked, processes) == parts


def test_processes_that_do_not_divide_a_batch_are_told_what_would():
    with pytest.raises(PocketfusionError, match="24 does not divide by 5 processes: .* multiple of 5, or 4 processes"):
        parts_of(settings(batch_size=24, micro_batch=2), 5)


def test_the_micro_batch_is_found_by_trial(monkeypatch, tmp_path):
    """A sample takes 100 bytes of 1,000: of a batch of 8, four fit; the run is the whole batch's to rounding."""
    tried = []

    def peak(task, model, step, size, autocast, device):
        tried.append(size)
        return 320.0 + 100 * size

    monkeypatch.setattr(micro_batch, "_peak", peak)
    monkeypatch.setattr(micro_batch, "_budget", lambda *given: 800.0)
    found = train(LineTask(), settings(micro_batch="auto"), tmp_path / "auto", fingerprint={})
    assert sorted(set(tried)) == [1, 2, 4]  # eight are expected not to fit
    monkeypatch.undo()
    whole = train(LineTask(), settings(), tmp_path / "whole", fingerprint={})
    assert torch.allclose(found.model.weight, whole.model.weight, atol=1e-5)
    losses = [[line["loss"] for line in read_log(tmp_path / name) if "loss" in line] for name in ("auto", "whole")]
    assert np.allclose(*losses, rtol=1e-5)
    monkeypatch.setattr(micro_batch, "_peak", peak)
    monkeypatch.setattr(micro_batch, "_budget", lambda *given: 10.0)
    with pytest.raises(PocketfusionError, match=r"not one sample fits .*gradient_checkpointing"):
        train(LineTask(), settings(micro_batch="auto"), tmp_path / "none", fingerprint={})
    assert train(LineTask(), settings(micro_batch=3), tmp_path / "whole", fingerprint={}).steps == 12  # same run


def test_settings_without_the_new_ones_are_what_older_runs_are_known_by(tiny_recipe):
    plain = settings()
    assert not {"optimizer", "teacher_weights", "micro_batch", "offload", "log_with"} & set(plain.model_dump())
    assert json.loads(plain.model_dump_json()) == plain.model_dump(mode="json")
    assert settings(optimizer="adamw-8bit", micro_batch=2).model_dump()["optimizer"] == "adamw-8bit"
    section = load_recipe(tiny_recipe).step_distillation
    train_settings = section.train.model_copy(update={"held_out": 3, "micro_batch": 2})
    changed = replaced(section.model_copy(update={"train": train_settings}), {"steps": 4})
    assert isinstance(changed, StepDistillSettings) and changed.steps == 4
    assert changed.train.held_out == 3 and changed.train.micro_batch == 2


@pytest.mark.parametrize(("again", "precision"), [(False, "bf16"), (True, "no")])
def test_the_plan_is_what_the_allocator_gives(tiny_recipe, again, precision):
    """torch's profiler, which records what its CPU allocator hands out, against arithmetic on fake tensors."""
    (work,) = [work for work in works_of(load_recipe(tiny_recipe)) if work.name == "teacher"]
    change = {"mixed_precision": precision, "gradient_checkpointing": again, "batch_size": 16}
    room = Planner("cpu").room(work, work.train.model_copy(update=change))
    network = work.student.make().train()
    network.set_attn_processor(AttnProcessor())
    if again:
        checkpoint_activations(network)
    x, t, states = work.student.inputs(16)
    given = torch.randn_like(x), t, torch.randn_like(states)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = network(*given).sample.float().square().mean()
        loss.backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()
    assert room.parts["activations, gradients"] == pytest.approx(peak, rel=0.15)
    count = sum(p.numel() for p in network.parameters())
    assert room.parts["weights"] == 4 * count and room.parts["moments"] == 8 * count


def test_the_plan_command(tiny_recipe, cli):
    done = cli("plan", tiny_recipe, "--gpu-gb", "2", "--stage", "recovery", "--processes", "2")
    assert done.returncode == 0, done.stderr
    assert "weights 0.00 + moments 0.00" in done.stdout and "+ optimizer adamw-8bit: micro_batch 2" in done.stdout
    done = cli("plan", tiny_recipe, "--gpu-gb", "0.61", "--stage", "recovery")
    assert "as the recipe is:" in done.stdout and "CUDA 0.60" in done.stdout
    done = cli("plan", tiny_recipe, "--stage", "recover", "--gpu-gb", "24")
    assert done.returncode == 2 and "did you mean 'recovery'?" in done.stderr


def test_random_numbers_belong_to_the_sample_and_are_of_their_kind():
    plan = BatchPlan([(np.arange(500), 1.0)], 256, seed=1)
    one = plan.slice(3, 7, 2)
    whole = plan.part(3, 0, 1)
    for draw in (lambda b: b.randn(2, 3), lambda b: b.rand(), lambda b: b.randint(9), lambda b: b.rand(4)):
        assert torch.equal(draw(one), draw(whole)[7:9])
    drawn = torch.cat([plan.part(step, 0, 1).randn(64).flatten() for step in range(4)])
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.02 and abs((drawn**4).mean() - 3) < 0.1
    uniform = plan.part(0, 0, 1).rand(64)
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert len(torch.unique(drawn)) > 0.99 * len(drawn)  # no two samples, and no two steps, share their numbers
    near = F.cosine_similarity(plan.part(0, 0, 1).randn(1000), plan.part(1, 0, 1).randn(1000))
    assert near.abs().max() < 0.2
