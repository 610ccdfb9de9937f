"""Consistency distillation: its target against closed solutions and step distillation's, the task, the command."""

import json
import math
import re
import shutil
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from pocketfusion.cli import main
from pocketfusion.data.sources import open_dataset
from pocketfusion.distill import ddim
from pocketfusion.distill.consistency import (
    ConsistencyTask,
    cautions,
    check_scales,
    consistency_loss,
    consistency_target,
    distill_consistency,
    phase_times,
    student_sampling,
)
from pocketfusion.errors import PocketfusionError
from pocketfusion.models.guided import noise_batch, sample_images
from pocketfusion.models.sampling import Sampling, read_sampling, write_sampling
from pocketfusion.models.text_encoder import TextEncoder
from pocketfusion.recipe import load_recipe
from pocketfusion.train.loop import train
from pocketfusion.train.place import StageRun
from pocketfusion.train.start import open_start

T = 1000
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def schedule():
    return ddim.NoiseSchedule(
        DDIMScheduler(
            num_train_timesteps=T,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            set_alpha_to_one=False,
        )
    )


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every_step(teacher_steps, steps):
    """[4, K N]: each step of the teacher's grid once."""
    return phase_times(torch.arange(teacher_steps), teacher_steps, steps, T)


def waves(z, now, rows=None):
    """A made-up teacher without structure."""
    return torch.tanh(z * 0.7 + now.float().view(-1, 1, 1, 1) / 500) * 1.5


def test_phases_by_hand():
    times = every_step(8, 2)
    assert times[0].tolist() == [999, 874, 749, 624, 499, 374, 249, 124]
    assert times[1].tolist() == times[2].tolist() == [874, 749, 624, 499, 374, 249, 124, -1]
    assert times[3].tolist() == [499] * 4 + [-1] * 4
    # 32 steps of 31 and four of 250: the next begins where diffusers says, and the phase ends where the student's step
    assert every_step(32, 4)[:, 2].tolist() == [937, 906, 905, 749]
    assert every_step(32, 4)[:, 7].tolist() == [780, 749, 749, 749]
    with pytest.raises(PocketfusionError, match="9 teacher steps do not divide into 2"):
        every_step(9, 2)


@pytest.mark.parametrize("steps", [4, 2, 1])
def test_what_solves_it_is_step_distillation_over_the_whole_phase(schedule, steps):
    """A student that makes the remaining teacher steps gets the target of all K; at a phase's last, of one."""
    times = every_step(16, steps)
    z, ratio = draw(16, 4, 3, 3), 16 // steps
    phases = ddim.spans(torch.arange(steps), 16, steps, T)

    def rest(z, now):
        made = []
        for row, time in zip(z[:, None], now, strict=True):
            at, phase = (phases.begins == time).nonzero()[0].tolist()
            left = phases.begins[at:, phase, None], phases.ends[at:, phase, None]
            end = ddim.rollout(waves, row, *left, schedule)
            made.append(ddim.v_target(row, end, *(schedule.at(t.view(1), row) for t in (time, phases.end[phase]))))
        return torch.cat(made)

    target = consistency_target(waves, lambda z, now, rows: rest(z, now), z, times, schedule)
    torch.testing.assert_close(target, rest(z, times[0]), rtol=1e-4, atol=1e-5)
    whole = torch.arange(16) % ratio == 0
    assert torch.equal(times[0][whole], phases.begins[0]) and torch.equal(times[3][whole], phases.end)
    end = ddim.rollout(waves, z[whole], phases.begins, phases.ends, schedule)
    levels = schedule.at(phases.begins[0], z), schedule.at(phases.end, z)
    torch.testing.assert_close(target[whole], ddim.v_target(z[whole], end, *levels), rtol=1e-4, atol=1e-5)
    last = times[2] == times[3]
    assert int(last.sum()) == steps
    # the teacher's own v, but for the half timestep that 16 steps of 62 leave
    torch.testing.assert_close(target[last], waves(z, times[0])[last], rtol=0.02, atol=0.05)


def test_the_student_is_asked_only_inside_phases_and_for_its_own_rows(schedule):
    asked = []

    def student(z, now, rows):
        asked.append((rows.tolist(), now.tolist()))
        return z

    consistency_target(waves, student, draw(4, 1, 2, 2), every_step(4, 2), schedule)
    assert asked == [([0, 2], [749, 249])]


def test_one_picture_for_all_prompts_is_solved_exactly(schedule):
    """Data of one point μ: v = (α z − μ) / σ has straight paths in x, so one step lands where many do: no loss."""
    mu = draw(1, 4, 2, 2, seed=3)

    def exact(z, now, rows=None):
        return ddim.v_from_x(z, mu, schedule.at(now, z))

    for steps in (4, 1):
        times = every_step(40, steps)
        at = schedule.at(times[0], torch.zeros(40, 4, 2, 2))
        z = ddim.add_noise(mu, draw(40, 4, 2, 2), at)
        target = consistency_target(exact, exact, z, times, schedule)
        assert consistency_loss(exact(z, times[0]), target, at).item() < 1e-7
        assert consistency_loss(exact(z, times[0]) + 0.1, target, at).item() > 5e-3


def test_gaussian_data_are_solved_in_the_limit_of_fine_steps(schedule):
    """x ~ N(μ, s²): the teacher is E[v | z], the student the closed solution of its ODE, z_r = α_r μ + (√ / √) (…)."""
    mu, s = 0.4, 0.5

    def spread(at):
        return (at.alpha.square() * s * s + at.sigma.square()).sqrt()

    def teacher(z, now):
        at = schedule.at(now, z)
        x = mu + at.alpha * s * s / spread(at).square() * (z - at.alpha * mu)
        return ddim.v_from_x(z, x, at)

    def loss(teacher_steps):
        times = every_step(teacher_steps, 2)
        at = schedule.at(times[0], torch.zeros(1, 1, 1, 1))
        z = at.alpha * mu + spread(at) * draw(teacher_steps, 1, 8, 8)

        def jump(z, now, end):
            here, there = schedule.at(now, z), schedule.at(end, z)
            z_end = there.alpha * mu + spread(there) / spread(here) * (z - here.alpha * mu)
            return ddim.v_target(z, z_end, here, there)

        target = consistency_target(teacher, lambda z, now, rows: jump(z, now, times[3][rows]), z, times, schedule)
        return consistency_loss(jump(z, times[0], times[3]), target, at).item()

    coarse, fine, finest = loss(8), loss(40), loss(200)
    assert coarse > 1e-4 and fine < coarse / 10 and finest < fine / 10


def test_losses_by_hand():
    at = ddim.Level(*(torch.tensor(value).view(1, 1, 1, 1) for value in (0.6, 0.8)))
    v, target = torch.full((1, 1, 1, 2), 3.0), torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    squared = 0.64 * (4 + 1) / 2
    assert consistency_loss(v, target, at).item() == pytest.approx(squared)
    assert consistency_loss(v, target, at, 0.5).item() == pytest.approx(math.sqrt(squared + 0.25) - 0.5)


# the task on real networks


def settings_of(recipe, **changes):
    section = recipe.consistency
    return section.model_validate({**section.model_dump(), **changes})


@pytest.fixture(scope="module")
def make_task(trained, tiny_recipe, tiny_data, tmp_path_factory):
    cache, recipe, data = tmp_path_factory.mktemp("cache"), load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    start = open_start(trained / "base", recipe)

    def make(guidance="classifier-free", **changes):
        settings = settings_of(recipe, **changes)
        student = replace(start, unet=deepcopy(start.unet))
        sampling = Sampling(num_inference_steps=settings.steps, guidance_scale=3.0, guidance=guidance)
        task = ConsistencyTask(recipe, settings, data, student, deepcopy(start.unet), sampling, "classifier-free")
        task.prepare(cache, student.vae_hash, student.text.fingerprint, student.device)
        task.to(torch.device("cpu"))
        return task

    return make


def gradients(task, step=0, part=0, parts=1):
    task.model.zero_grad()
    loss, logged = task.loss(task.model, task.plan.part(step, part, parts))
    loss.backward()
    return loss.item(), logged, [p.grad.clone() for p in task.model.parameters()]


def test_the_gradient_is_that_of_a_fixed_target(make_task):
    """Student and target share weights; yet the gradient is that of |v − constant|."""
    task = make_task(loss="mse")
    _, logged, found = gradients(task)
    made = task.jumps(task.plan.part(0, 0, 1))
    teacher, student = (task.predictor(unet, "classifier-free", made) for unet in (task.teacher, task.model))
    target = consistency_target(teacher, student, made.z_t, made.times, task.schedule)
    assert not target.requires_grad
    task.model.zero_grad()
    at = task.schedule.at(made.times[0], made.z_t)
    loss = consistency_loss(student(made.z_t, made.times[0]), target, at)
    loss.backward()
    assert logged["squared"] == pytest.approx(loss.item(), rel=1e-5)
    for grad, parameter in zip(found, task.model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_weight_learns_under_autocast(make_task, precision):
    """Also after the target's pass over the same weights, whose casts autocast may keep without their gradients."""
    task = make_task("folded", teacher_precision=precision)
    without = [bool(grad.any()) for grad in gradients(task)[2]]
    task.model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task.loss(task.model, task.plan.part(0, 0, 1))
    loss.backward()
    assert loss.dtype == torch.float32 and sum(without) > 0.9 * len(without)  # attention over one token has no keys
    assert [p.grad is not None and bool(p.grad.any()) for p in task.model.parameters()] == without


def test_two_parts_of_a_batch_are_the_batch(make_task):
    """What two processes do."""
    task = make_task()
    whole, _, wanted = gradients(task, step=3)
    parts = [gradients(task, step=3, part=part, parts=2) for part in range(2)]
    assert sum(loss for loss, *_ in parts) / 2 == pytest.approx(whole, rel=1e-5)
    for together, one, two in zip(wanted, parts[0][2], parts[1][2], strict=True):
        torch.testing.assert_close(together, (one + two) / 2, rtol=1e-3, atol=1e-5)


def test_scales(make_task):
    u = torch.tensor([0.0, 0.5, 1.0])
    assert make_task(guidance_range=(2.0, 6.0)).scales(u).tolist() == [2, 4, 6]
    assert make_task("folded").scales(u).tolist() == [3, 3, 3]


def test_validation_is_nothing_for_the_teachers_own_steps_and_one_for_a_single_one(make_task):
    task = make_task()  # classifier-free and not trained yet: the student is the teacher
    assert task.validate(task.model)["val_landing_left"] == pytest.approx(1, rel=1e-5)
    made, target, _ = task._held_out[0]
    task.predictor = lambda *_: lambda z, now: target
    assert task.validate(task.model) == {"val_landing": 0, "val_landing_left": 0}
    teacher = make_task().predictor(task.teacher, "classifier-free", made)
    with torch.no_grad():
        span = ddim.spans(torch.arange(len(made.z_t)) % 2, 6, 2, T)
        end = ddim.rollout(teacher, made.z_t, span.begins, span.ends, task.schedule)
    landed = ddim.ddim_step(made.z_t, target, *(task.schedule.at(now, end) for now in (made.times[0], span.end)))
    torch.testing.assert_close(landed, end, rtol=0, atol=1e-4)


def test_it_learns_and_resumes_to_the_sample(make_task, tmp_path):
    """Training brings the jump nearer to the teacher's steps; a run that stopped halfway ends the same."""
    changes = {"steps": 1, "teacher_steps": 4}

    def run(where, count):
        task = make_task("folded", **changes)
        wanted = {"steps": count, "batch_size": 4, "schedule": "constant", "learning_rate": 3e-3, "ema_decay": 0.0}
        settings = task.consistency.train.model_copy(update={**wanted, "checkpoint_every": 99, "preview_every": 99})
        task.preview = lambda model: Image.new("RGB", (4, 4))
        return train(task, settings, where, fingerprint={}), task

    whole, task = run(tmp_path / "whole", 16)
    begin = make_task("folded", **changes)
    before = begin.validate(begin.model)["val_landing"]
    assert whole.figures["val_landing"] < 0.9 * before
    run(tmp_path / "halves", 7)
    again, other = run(tmp_path / "halves", 16)
    assert again.figures == whole.figures
    for one, two in zip(task.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)


# what guidance the result has


def classifier_free(**changes):
    return Sampling(**{"num_inference_steps": 8, "guidance_scale": 5.0, **changes})


@pytest.mark.parametrize(
    ("changes", "stated", "taught", "expected"),
    [
        ({}, None, None, ("folded", 4.0, None)),  # the recipe's own scale
        ({"guidance_scale": 2.5}, classifier_free(), None, ("folded", 2.5, None)),
        ({}, classifier_free(), classifier_free(guidance="folded", guidance_scale=3.0), ("folded", 3.0, None)),
        ({"guidance": "classifier-free"}, classifier_free(), None, ("classifier-free", 5.0, None)),
        ({"guidance": "embedded"}, classifier_free(), None, ("embedded", 5.0, (1.0, 8.0))),
        (
            {"guidance_range": (1.0, 3.0)},
            classifier_free(guidance="embedded"),
            None,
            ("embedded", 3.0, (1.0, 3.0)),
        ),
        ({}, classifier_free(guidance="folded"), None, ("folded", 5.0, None)),
    ],
)
def test_guidance_of_the_result(tiny_recipe, changes, stated, taught, expected):
    recipe = load_recipe(tiny_recipe)
    own = stated.guidance if stated else "classifier-free"
    made = student_sampling(recipe, settings_of(recipe, **changes), own, stated, taught)
    assert (made.guidance, made.guidance_scale, made.guidance_range) == expected and made.num_inference_steps == 2


def test_guidance_that_cannot_be(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe)
    for own, asked in (("embedded", "folded"), ("folded", "embedded"), ("folded", "classifier-free")):
        with pytest.raises(PocketfusionError, match=f"has {own} guidance and cannot get {asked}"):
            student_sampling(recipe, settings_of(recipe, guidance=asked), own, None, None)
    embedded = Sampling(num_inference_steps=2, guidance_scale=4, guidance="embedded")
    folded = Sampling(num_inference_steps=2, guidance_scale=4, guidance="folded")
    narrow = embedded.model_copy(update={"guidance_range": (1.0, 6.0)})
    for asked, taught, words in (
        (embedded, narrow, "knows the guidance 1 to 6, not 1 to 8"),
        (embedded, folded, "knows the guidance 4, not 1 to 8"),
        (folded.model_copy(update={"guidance_scale": 7.0}), narrow, "knows the guidance 1 to 6, not 7"),
    ):
        with pytest.raises(PocketfusionError, match=words):
            check_scales(settings_of(recipe), asked, tmp_path / "teacher", taught)
    check_scales(settings_of(recipe), folded, tmp_path, folded)
    check_scales(settings_of(recipe), folded, tmp_path, narrow)
    check_scales(settings_of(recipe), embedded, tmp_path, None)


def test_cautions(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe)
    student, teacher = tmp_path / "student", tmp_path / "teacher"
    student.mkdir()
    teacher.mkdir()
    assert cautions(settings_of(recipe), student, teacher) == []
    write_sampling(student, classifier_free(num_inference_steps=2))
    write_sampling(teacher, classifier_free())
    few, many = cautions(settings_of(recipe), student, teacher)
    assert "drawn in 2 steps already: 2 are no fewer" in few and "give --teacher-steps 8" in many
    write_sampling(student, classifier_free())
    assert cautions(settings_of(recipe, teacher_steps=8), student, teacher) == []


# from the command to the picture


@pytest.fixture(scope="module")
def two_steps(trained, tiny_recipe, tiny_data, cli, tmp_path_factory):
    out = tmp_path_factory.mktemp("consistency") / "two"
    base = trained / "base"
    done = cli(
        *("distill-consistency", base, "--teacher", base, "--recipe", tiny_recipe, "--data", tiny_data),
        *("--out", out, "--fold", 3, "--train-steps", 4),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "val_landing_left" in done.stdout and "finished" in done.stdout and "note:" not in done.stderr
    return out


def test_the_folder_draws_in_stock_diffusers_with_one_call_a_step(two_steps):
    assert read_sampling(two_steps) == Sampling(num_inference_steps=2, guidance_scale=3, guidance="folded")
    assert json.loads((two_steps / "scheduler/scheduler_config.json").read_text())["timestep_spacing"] == "trailing"
    stock = StableDiffusionPipeline.from_pretrained(two_steps, torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    calls = []
    stock.unet.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    theirs = stock(
        "a red disc", latents=noise_batch([7], (4, 8, 8)), num_inference_steps=2, guidance_scale=1.0, output_type="np"
    ).images
    assert calls == [1, 1]
    text = TextEncoder(stock.text_encoder, stock.tokenizer)
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    drawn = {"num_inference_steps": 2, "guidance_scale": 3.0, "guidance": "folded"}
    ours = sample_images(stock.unet, stock.vae, text, scheduler, ["a red disc"], [7], **drawn)
    assert 10 * math.log10(1 / np.mean((ours[0] / 255.0 - theirs[0]) ** 2)) >= 40


def test_one_step_with_a_guidance_input(trained, tiny_recipe, tiny_data, tmp_path):
    """The embedded mode: the UNet gets its input, it trains, and the folder says so."""
    recipe, base = load_recipe(tiny_recipe), trained / "base"
    changes = {"steps": 1, "teacher_steps": 4, "guidance": "embedded", "guidance_range": (1.5, 4.0)}
    out = tmp_path / "one"
    stage = StageRun.at(out)
    made = distill_consistency(recipe, settings_of(recipe, **changes), open_dataset(tiny_data, 64), base, base, stage)
    assert made.finished and made.samples_seen == 48 and set(made.parents) == {"student", "teacher"}
    stated = read_sampling(out)
    assert stated.guidance == "embedded" and stated.guidance_range == (1.5, 4) and stated.num_inference_steps == 1
    assert load_file(out / UNET)["time_embedding.cond_proj.weight"].abs().sum() > 0


def test_what_is_refused(trained, two_steps, tiny_recipe, tiny_data, cli, tmp_path, monkeypatch, capsys):
    """The first as a user meets it; the others by the same entry point in this process, which has torch already."""
    base, out = trained / "base", tmp_path / "out"
    other = shutil.copytree(base, tmp_path / "other")
    config = other / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.02}))
    epsilon = tmp_path / "epsilon.yaml"
    epsilon.write_text(tiny_recipe.read_text().replace("v_prediction", "epsilon"))
    without = tmp_path / "without.yaml"
    without.write_text(re.sub(r"^consistency:\n( .*\n)+", "", tiny_recipe.read_text(), flags=re.MULTILINE))

    def arguments(teacher, recipe, *options):
        return ["distill-consistency", base, "--teacher", teacher, "--recipe", recipe, "--data", tiny_data, *options]

    done = cli(*arguments(base, tiny_recipe, "--teacher-steps", 5), "--out", out)
    assert done.returncode == 2 and "5 teacher steps do not divide into 2" in done.stderr and not out.exists()
    assert "Traceback" not in done.stderr
    for teacher, recipe, options, words in (
        (base, tiny_recipe, ("--fold", 3, "--guidance-range", "1,4"), "leave out every other guidance option"),
        (base, tiny_recipe, ("--guidance-mode", "folded", "--guidance-range", "1,4"), "give one of them"),
        (base, tiny_recipe, ("--teacher-steps", 1000), "1000 teacher steps are finer than the noise schedule"),
        (base, tiny_recipe, ("--fold", 0.5), "guidance_scale: "),
        (base, tiny_recipe, ("--guidance-range", "4,1"), "two ascending guidance scales"),
        (base, without, (), "has no section 'consistency'"),
        (base, epsilon, (), "prediction_type 'epsilon', which few steps cannot use"),
        (other, tiny_recipe, (), "they differ in noise schedule's beta_end"),
        (two_steps, tiny_recipe, ("--fold", 5), "knows the guidance 3, not 5"),
        (tmp_path / "no", tiny_recipe, (), "there is no model folder"),
    ):
        monkeypatch.setattr(
            sys, "argv", ["pocketfusion", *map(str, arguments(teacher, recipe, *options, "--out", out))]
        )
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2 and words in capsys.readouterr().err and not out.exists()
