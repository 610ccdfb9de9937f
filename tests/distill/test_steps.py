"""`distill-steps` on a tiny model: targets, learning, what comes out, resuming, two processes, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from pocketfusion.data.sources import open_dataset
from pocketfusion.distill import ddim
from pocketfusion.distill.objectives import TargetCache
from pocketfusion.distill.steps import StepTask, distill_progressively, distill_steps, sampling_of
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import folder_hash, read_provenance
from pocketfusion.models.sampling import Sampling, read_sampling, write_sampling
from pocketfusion.recipe import load_recipe
from pocketfusion.train.loop import train
from pocketfusion.train.place import StageRun
from pocketfusion.train.start import open_start
from processes import assert_same_training, launch_two

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def arguments(trained, tiny_recipe, tiny_data):
    base = trained / "base"
    return ("distill-steps", base, "--teacher", base, "--recipe", tiny_recipe, "--data", tiny_data)


@pytest.fixture(scope="module")
def distilled(arguments, trained, cli):
    """The tiny base from 4 steps to 2."""
    done = cli(*arguments, "--out", trained / "steps2", "--p", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    return trained / "steps2"


@pytest.fixture
def task(trained, tiny_recipe, tiny_data, tmp_path):
    """Makes a task whose student and teacher are both the tiny base."""

    def make(cache=None, **changes) -> StepTask:
        recipe = load_recipe(tiny_recipe)
        student, teacher = open_start(trained / "base", recipe), open_start(trained / "base", recipe)
        settings = recipe.step_distillation.model_copy(update=changes)
        samplings = (sampling_of(teacher, settings.teacher_steps, 4), sampling_of(student, settings.steps, 4))
        made = StepTask(recipe, settings, open_dataset(tiny_data, 64), student, teacher.unet, samplings, cache)
        made.prepare(tmp_path, student.vae_hash, student.text.fingerprint, torch.device("cpu"))
        made.to(torch.device("cpu"))
        return made

    return make


@pytest.mark.parametrize(("steps", "probability"), [(2, 0.0), (2, 0.5), (2, 1.0), (16, 0.5)])
def test_a_step_with_the_target_lands_where_two_guided_teacher_steps_of_diffusers_do(task, steps, probability):
    made = task(guidance_probability=probability, steps=steps, teacher_steps=2 * steps)
    batch, _ = made.distilled(made.plan.part(2, 0, 1))
    stock, own = (DDIMScheduler.from_config(made.scheduler.config) for _ in range(2))
    stock.set_timesteps(2 * steps)
    own.set_timesteps(steps)
    drawn = zip(batch.span.begins[0], batch.target.split(1), batch.z_t.split(1), strict=True)
    landed = torch.cat([own.step(v, int(t), z).prev_sample for t, v, z in drawn])
    for i, w in enumerate(batch.scale):
        z = batch.z_t[i : i + 1]
        for t in batch.span.begins[:, i]:
            with torch.no_grad():
                cond = made.teacher(z, t, batch.states[i : i + 1]).sample
                uncond = made.teacher(z, t, made.null[None]).sample
            z = stock.step(uncond + w * (cond - uncond), int(t), z).prev_sample
        torch.testing.assert_close(landed[i : i + 1], z, rtol=1e-3, atol=1e-4)
    if probability == 1:
        assert (batch.scale >= 2).all()


def test_noise_times_and_guidance_come_from_the_grid_and_one_draw(task):
    made = task(steps=2, teacher_steps=8, guidance_probability=1.0)
    batch, _ = made.distilled(made.plan.part(0, 0, 1))
    assert batch.span.begins.shape[0] == 4
    assert set(batch.span.begins[0].tolist()) <= set(ddim.sampler_steps(2, 1000).begins.tolist())
    whole, _ = made.distilled(made.plan.part(1, 0, 1))
    halves = [made.distilled(made.plan.part(1, part, 2))[0] for part in range(2)]
    for name in ("z_t", "scale", "states"):
        torch.testing.assert_close(torch.cat([getattr(h, name) for h in halves]), getattr(whole, name))
    torch.testing.assert_close(torch.cat([h.target for h in halves]), whole.target, rtol=1e-3, atol=1e-4)
    real = task(grid="continuous")
    span = real.spans(real.plan.part(0, 0, 1))
    assert (span.begins != span.begins.round()).any() and (span.ends >= -1).all()


def test_a_student_that_is_exact_has_no_loss_and_learning_lowers_it(task):
    made = task(original_weight=0.0)
    part = made.plan.part(0, 0, 1)
    batch, _ = made.distilled(part)
    found = made.validate(made.model)
    assert found["val_vanilla"] > 0 and found["val_guided"] > 0
    optimizer = torch.optim.Adam(made.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss, logged = made.loss(made.model, made.plan.part(0, 0, 1))
        assert loss.item() == pytest.approx(logged["distilled"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in made.teacher.parameters())
    made.student = lambda model, given: given.target  # type: ignore[method-assign]
    assert made.loss(made.model, made.plan.part(0, 0, 1))[0].item() == 0.0


def test_the_original_loss_joins_as_the_settings_say(task):
    made = task(original_weight=0.2, guidance_probability=0.0)
    loss, logged = made.loss(made.model, made.plan.part(0, 0, 1))
    assert loss.item() == pytest.approx(1.2 * logged["distilled"], rel=1e-5)
    fixed = task(original_weight=0.5, guidance_probability=0.0, dynamic_scaling=False)
    loss, logged = fixed.loss(fixed.model, fixed.plan.part(0, 0, 1))
    assert loss.item() == pytest.approx(logged["distilled"] + 0.5 * logged["original"], rel=1e-5)


def test_shared_targets_are_read_not_made_again(task, tmp_path):
    first = task(TargetCache(tmp_path / "targets", {"a": 1}))
    before, _ = first.distilled(first.plan.part(0, 0, 1))
    second = task(TargetCache(tmp_path / "targets", {"a": 1}))
    second.teacher = None  # it would fail if it were asked
    after, _ = second.distilled(second.plan.part(0, 0, 1))
    assert torch.equal(before.target, after.target)
    other = TargetCache(tmp_path / "targets", {"a": 2})
    assert not list(other.folder.iterdir())


def test_the_result_says_how_it_is_sampled_and_loads_in_stock_diffusers(distilled, trained):
    assert read_sampling(distilled) == Sampling(num_inference_steps=2, guidance_scale=4.0)
    made = read_provenance(distilled)
    assert made.stage == "distill-steps" and {"val_vanilla", "val_guided"} <= made.results.keys()
    assert made.parents == dict.fromkeys(("student", "teacher"), folder_hash(trained / "base"))
    assert made.settings["guidance_probability"] == 0.5
    pipeline = StableDiffusionPipeline.from_pretrained(distilled)
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    before, after = load_file(trained / "base" / WEIGHTS), load_file(distilled / WEIGHTS)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_folder_with_another_timestep_spacing_gets_the_trailing_one(trained, tiny_recipe, tiny_data, tmp_path):
    base = shutil.copytree(trained / "base", tmp_path / "base")
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"timestep_spacing": "leading", "_class_name": "PNDMScheduler"})
    )
    index = base / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"scheduler": ["diffusers", "PNDMScheduler"]}))
    recipe = load_recipe(tiny_recipe)
    scheduler = recipe.teacher.scheduler | {"timestep_spacing": "leading"}
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"scheduler": scheduler})})
    settings = recipe.step_distillation
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": 1})})
    out = tmp_path / "out"
    distill_steps(recipe, settings, open_dataset(tiny_data, 64), base, base, StageRun.at(out))
    stock = StableDiffusionPipeline.from_pretrained(out).scheduler
    assert type(stock) is DDIMScheduler and stock.config.timestep_spacing == "trailing"


def test_a_stopped_training_repeats_the_uninterrupted_one(distilled, arguments, tmp_path, cli):
    run = shutil.copytree(distilled.with_name("steps2.run"), tmp_path / "run")
    shutil.rmtree(sorted((run / "checkpoints").glob("step_*"))[-1])  # back to step 4
    done = cli(*arguments, "--out", tmp_path / "again", "--run", run, "--p", "0.5")
    assert done.returncode == 0, done.stderr
    one, two = load_file(distilled / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_train_the_same_network(distilled, arguments, trained, tmp_path):
    launch_two("-m", "pocketfusion", *arguments, "--out", tmp_path / "two", "--p", "0.5", port=29617)
    assert_same_training(distilled / WEIGHTS, tmp_path / "two" / WEIGHTS, trained / "base" / WEIGHTS)


def test_progressive_halves_one_pair_after_the_other(trained, tiny_recipe, tiny_data, tmp_path):
    recipe = load_recipe(tiny_recipe)
    settings = recipe.step_distillation.model_copy(update={"teacher_steps": 8, "steps": 2})
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": 2})})
    data, base, stage = open_dataset(tiny_data, 64), trained / "base", StageRun.at(tmp_path / "out")
    made = distill_progressively(recipe, settings, data, base, base, stage, tmp_path / "cache")
    middle = tmp_path / "out.run" / "steps-4"
    assert read_provenance(middle).settings["teacher_steps"] == 8
    assert made.settings["steps"] == 2 and made.settings["teacher_steps"] == 4
    assert made.parents == {"student": folder_hash(middle), "teacher": folder_hash(middle)}
    with pytest.raises(PocketfusionError, match="6 steps cannot be halved down to 2"):
        odd = settings.model_copy(update={"teacher_steps": 6})
        distill_progressively(recipe, odd, data, base, base, stage)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--teacher-steps", "5"), "5 teacher steps do not divide into 2 student steps: give a multiple such as 6"),
        (("--guidance-range", "5"), "--guidance-range '5' is no range: give two numbers as 2,14"),
        (("--guidance-range", "9,3"), "the guidance range 9,3 is none: give two rising numbers from 1, as 2,14"),
        (("--p", "1.5"), "guidance_probability: Input should be less than or equal to 1 (got 1.5)"),
        (("--train-steps", "0"), "steps: Input should be greater than 0 (got 0)"),
    ],
)
def test_wrong_settings_are_refused(arguments, tmp_path, cli, more, said):
    done = cli(*arguments, "--out", tmp_path / "out", *more)
    assert done.returncode == 2 and said in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_a_teacher_of_another_family_is_refused(arguments, trained, tmp_path, cli):
    other = shutil.copytree(trained / "base", tmp_path / "other")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
    done = cli(*arguments[:3], other, *arguments[4:], "--out", tmp_path / "out")
    assert done.returncode == 2 and "noise schedule's beta_end (0.012 and 0.02)" in " ".join(done.stderr.split())
    done = cli(*arguments[:3], tmp_path / "none", *arguments[4:], "--out", tmp_path / "out")
    assert done.returncode == 2 and "there is no model folder" in done.stderr


def test_folded_guidance_is_not_distilled_over_a_range(trained, tiny_recipe, tiny_data, tmp_path):
    base = shutil.copytree(trained / "base", tmp_path / "base")
    write_sampling(base, Sampling(num_inference_steps=4, guidance_scale=3, guidance="folded"))
    recipe = load_recipe(tiny_recipe)
    with pytest.raises(PocketfusionError, match="knows one scale"):
        settings = recipe.step_distillation
        distill_steps(recipe, settings, open_dataset(tiny_data, 64), base, base, StageRun.at(tmp_path / "out"))


def test_a_model_that_predicts_noise_is_sent_to_to_v(trained, tiny_recipe, tiny_data, tmp_path):
    recipe = load_recipe(tiny_recipe)
    scheduler = recipe.teacher.scheduler | {"prediction_type": "epsilon"}
    recipe = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"scheduler": scheduler})})
    base, data = trained / "base", open_dataset(tiny_data, 64)
    with pytest.raises(PocketfusionError, match="predicts epsilon: run to-v first"):
        distill_steps(recipe, recipe.step_distillation, data, base, base, StageRun.at(tmp_path / "out"))


def test_nan_in_either_network_is_refused(arguments, trained, tmp_path, cli):
    from safetensors.torch import save_file

    bad = shutil.copytree(trained / "base", tmp_path / "bad")
    weights = load_file(bad / WEIGHTS)
    weights["conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(weights, bad / WEIGHTS, metadata={"format": "pt"})
    for position in (1, 3):
        changed = [*arguments]
        changed[position] = bad
        done = cli(*changed, "--out", tmp_path / "out")
        assert done.returncode == 2 and "conv_in.weight holds NaN" in done.stderr


@pytest.mark.parametrize(("share", "parts"), [(0.5, 2), (0.5, 4), (0.25, 4), (0.1, 2)])
def test_the_share_of_the_original_loss_is_the_same_samples_in_parts(task, share, parts):
    """Also where some parts have none of them, and where the share is less than a sample."""
    made = task(original_share=share, guidance_probability=0.0)

    def original(batch):
        batch_, x = made.distilled(batch)
        return made.original(made.model, x, batch_.states, batch).item()

    with torch.no_grad():
        found = [original(made.plan.part(1, part, parts)) for part in range(parts)]
        assert np.mean(found) == pytest.approx(original(made.plan.part(1, 0, 1)), rel=1e-4)


def test_a_guided_sample_weighs_what_an_unguided_one_does_if_it_is_normalised(task):
    plain, normalised = (
        task(guidance_probability=0.5, guidance_normalised=on, original_weight=0.0) for on in (False, True)
    )
    batch, found = plain.distilled(plain.plan.part(0, 0, 1))[0], {}
    assert 0 < (batch.scale == 1).sum() < len(batch.scale)
    v = batch.target + 0.1 * batch.scale.view(-1, 1, 1, 1)
    for name, made in (("plain", plain), ("normalised", normalised)):
        made.student = lambda model, given: v  # type: ignore[method-assign]
        found[name] = made.loss(made.model, made.plan.part(0, 0, 1))[0].item()
    weight = ddim.truncated_snr_in_v(plain.schedule.at(batch.span.begins[0], v)).flatten()
    w = batch.scale
    assert found["plain"] == pytest.approx((weight * (0.1 * w) ** 2).mean().item(), rel=1e-4)
    assert found["normalised"] == pytest.approx(
        (weight * (0.1 * w) ** 2 / (w**2 + (w - 1) ** 2)).mean().item(), rel=1e-4
    )
    # held-out figures stay the paper's, so that runs compare
    for made in (plain, normalised):
        made.student = lambda model, given: given.target + given.scale.view(-1, 1, 1, 1)  # type: ignore[method-assign]
    assert plain.validate(plain.model) == normalised.validate(normalised.model)
    assert plain.validate(plain.model)["val_guided"] > 10


def test_what_has_one_branch_is_not_normalised(trained, tiny_recipe, tiny_data, tmp_path):
    base = shutil.copytree(trained / "base", tmp_path / "base")
    write_sampling(base, Sampling(num_inference_steps=4, guidance_scale=3, guidance="folded"))
    recipe = load_recipe(tiny_recipe)
    settings = recipe.step_distillation.model_copy(update={"guidance_probability": 0.0, "guidance_normalised": True})
    with pytest.raises(PocketfusionError, match="has folded guidance, whose errors no scale multiplies"):
        distill_steps(recipe, settings, open_dataset(tiny_data, 64), base, base, StageRun.at(tmp_path / "out"))


def test_accumulation_trains_the_same_network(task, tmp_path):
    """Also with dynamic scaling, a ratio of two losses of the whole step."""
    ends, asked = {}, {}
    for parts in (1, 2, 4):
        made = task(guidance_probability=0.5, original_weight=1.0, original_share=0.5)
        forward, asked[parts] = made.teacher.forward, []
        made.teacher.forward = lambda *a, calls=asked[parts], forward=forward, **k: (
            calls.append(1),
            forward(*a, **k),
        )[1]
        before = {name: value.clone() for name, value in made.model.state_dict().items()}
        short = made.distill.train.model_copy(update={"steps": 2, "warmup_steps": 0, "gradient_accumulation": parts})
        made.validate, made.preview = (lambda model: {}), (lambda model: Image.new("RGB", (1, 1)))
        train(made, short, tmp_path / f"run-{parts}", fingerprint={})
        ends[parts] = {name: value - before[name] for name, value in made.model.state_dict().items()}
    whole = torch.cat([value.flatten() for value in ends[1].values()])
    for parts in (2, 4):
        other = torch.cat([value.flatten() for value in ends[parts].values()])
        assert (other - whole).norm() < 0.02 * whole.norm()
        assert len(asked[parts]) == parts * len(asked[1])  # the teacher is asked once, though there are two passes
