"""Guidance distillation: the new input, the task against hand computation, and the command from end to end."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from pocketfusion.data.sources import open_dataset
from pocketfusion.distill.guidance import (
    GuidanceTask,
    grid_timesteps,
    guidance_settings,
    plan_sampling,
    with_guidance_input,
)
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import folder_hash, read_provenance
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import ElasticUNet, as_elastic, as_stock, load_elastic
from pocketfusion.models.guided import guidance_embedding, noise_batch, sample_images
from pocketfusion.models.sampling import Sampling, read_sampling, write_sampling
from pocketfusion.models.text_encoder import TextEncoder
from pocketfusion.models.writing import copy_with_unet
from pocketfusion.recipe import load_recipe
from pocketfusion.runtime import denoise as runtime
from pocketfusion.train.start import open_start
from processes import launch_two
from tiny import tiny_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
NEW = "time_embedding.cond_proj.weight"


@pytest.fixture(scope="module")
def evolved():
    """An elastic UNet of another architecture than the stock one."""
    unet = as_elastic(tiny_pipeline().unet)
    return with_architecture(unet, unet.architecture.remove("mid_block.attentions.0")).eval()


@pytest.fixture(scope="module")
def embedded(trained, tiny_recipe, tiny_data, tmp_path_factory, cli):
    """What the command makes of the trained base."""
    out = tmp_path_factory.mktemp("guidance") / "embedded"
    arguments = ("--recipe", tiny_recipe, "--data", tiny_data, "--out", out)
    done = cli("distill-guidance", trained / "base", *arguments)
    assert done.returncode == 0 and "val_guidance_left" in done.stdout, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 8, 8), torch.tensor([900, 30]), torch.randn(2, 32, 32)


@pytest.fixture
def task(trained, tiny_recipe, tiny_data, tmp_path):
    """Makes the task of the trained base with itself as teacher."""

    def make(sampling, timesteps=None):
        recipe = load_recipe(tiny_recipe)
        start, teacher = (open_start(trained / "base", recipe) for _ in range(2))
        if sampling.guidance == "embedded":
            start = start.__class__(**{**start.__dict__, "unet": with_guidance_input(start.unet, 16)})
        data = open_dataset(tiny_data, 64)
        made = GuidanceTask(recipe, recipe.guidance, data, start, teacher.unet, "classifier-free", sampling, timesteps)
        made.prepare(tmp_path, start.vae_hash, start.text.fingerprint, torch.device("cpu"))
        return made

    return make


EMBEDDED = Sampling(num_inference_steps=2, guidance_scale=4, guidance="embedded", guidance_range=(1, 8))
FOLDED = Sampling(num_inference_steps=2, guidance_scale=5, guidance="folded")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["stock", "elastic", "evolved"])
def test_the_new_input_changes_nothing_bit_for_bit(kind, evolved, inputs):
    unet = {"stock": tiny_pipeline().unet, "elastic": as_elastic(tiny_pipeline().unet), "evolved": evolved}[kind]
    guided = with_guidance_input(unet, 20)
    assert type(guided) is type(unet) and guided.config.time_cond_proj_dim == 20
    before = unet(*inputs).sample
    for scale in (1.0, 7.5):
        condition = guidance_embedding(torch.full((2,), scale), 20)
        assert torch.equal(guided(*inputs, timestep_cond=condition).sample, before)
    torch.nn.init.normal_(guided.time_embedding.cond_proj.weight)
    assert not torch.equal(guided(*inputs, timestep_cond=condition).sample, before)
    assert torch.equal(unet(*inputs).sample, before)  # the original shares no weights with it
    with pytest.raises(PocketfusionError, match="takes a guidance scale already"):
        with_guidance_input(guided, 20)


@torch.no_grad()
def test_every_way_of_carrying_a_unet_keeps_the_input(trained, evolved, inputs, tmp_path):
    condition = guidance_embedding(torch.tensor([3.0, 6.0]), 20)
    stock, elastic = (with_guidance_input(unet, 20) for unet in (tiny_pipeline().unet, evolved))
    for unet in (stock, elastic):
        torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    draw = lambda unet: unet(*inputs, timestep_cond=condition).sample  # noqa: E731
    assert torch.equal(draw(as_elastic(stock)), draw(stock))
    back = as_stock(as_elastic(stock))
    assert type(back) is UNet2DConditionModel and torch.equal(draw(back), draw(stock))
    removed = with_architecture(as_elastic(stock), evolved.architecture)
    assert torch.equal(removed.time_embedding.cond_proj.weight, stock.time_embedding.cond_proj.weight)
    for name, unet, kind in (("stock", as_elastic(stock), UNet2DConditionModel), ("evolved", elastic, ElasticUNet)):
        (tmp_path / name).mkdir()
        copy_with_unet(trained / "base", tmp_path / name, unet, dtype=torch.float32)
        loaded = load_elastic(tmp_path / name)
        assert loaded.config.time_cond_proj_dim == 20
        torch.testing.assert_close(draw(loaded), draw(unet), atol=1e-5, rtol=0)  # a file's memory is not aligned
        assert json.loads((tmp_path / name / "unet" / "config.json").read_text())["_class_name"] == kind.__name__


def test_the_embedding_is_diffusers_own_in_torch_and_in_the_runtime():
    stock = StableDiffusionPipeline.get_guidance_scale_embedding
    for dim in (16, 256, 257):
        for scale in (1.0, 1.5, 7.5, 14.0):
            theirs = stock(None, torch.tensor([scale - 1]), embedding_dim=dim)
            ours = guidance_embedding(torch.tensor([scale]), dim)
            # angles reach 13,000 rad, of which fp32 keeps 1e-3; the runtime's are float64
            torch.testing.assert_close(ours, theirs, atol=3e-3, rtol=0)
            exact = runtime.guidance_embedding(scale, dim)
            assert exact.dtype == np.float32 and exact.shape == (1, dim)
            np.testing.assert_allclose(exact, ours.numpy(), atol=3e-3)
    angle = 1000 * 2.5 / 10000 ** (3 / 7)
    assert runtime.guidance_embedding(3.5, 16)[0, 3] == pytest.approx(math.sin(angle), abs=1e-6)
    assert runtime.guidance_embedding(3.5, 16)[0, 11] == pytest.approx(math.cos(angle), abs=1e-6)


def test_scales_and_timesteps_are_drawn_as_asked(task):
    made = task(EMBEDDED, torch.tensor([999, 499]))
    seen = []
    made.wanted = lambda *batch: seen.append(batch) or torch.zeros_like(batch[0])
    for step in range(40):
        made.loss(made.model, made.plan.part(step, 0, 1))
    scales, timesteps = (torch.cat([batch[i] for batch in seen]) for i in (3, 1))
    assert scales.min() >= 1 and scales.max() <= 8 and scales.mean().item() == pytest.approx(4.5, abs=0.8)
    assert set(timesteps.tolist()) == {999, 499}
    assert (task(FOLDED).scales(torch.rand(5)) == 5).all()


def test_the_target_by_hand(task, inputs):
    made = task(EMBEDDED)
    z, timesteps, states = inputs
    scales = torch.tensor([2.0, 6.0])
    with torch.no_grad():
        null = made.null.expand_as(states)
        cond, uncond = (made.teacher(z, timesteps, s).sample for s in (states, null))
    w = scales.view(-1, 1, 1, 1)
    torch.testing.assert_close(made.wanted(*inputs, scales), w * cond - (w - 1) * uncond, atol=1e-5, rtol=1e-5)


def test_the_student_begins_as_the_unguided_teacher(task):
    """So all of what guidance adds is left, and the loss is its mean square; the teacher gets no gradient."""
    made = task(EMBEDDED)
    assert made.validate(made.model)["val_guidance_left"] == pytest.approx(1, abs=1e-5)
    batch = made.plan.part(0, 0, 1)
    loss, logged = made.loss(made.model, batch)
    loss.backward()
    assert 0 < logged["relative"] < 10
    assert made.model.time_embedding.cond_proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in made.teacher.parameters())
    same, _ = made.loss(made.model, made.plan.part(0, 0, 1))
    assert same.item() == pytest.approx(loss.item(), rel=1e-6)  # the step's numbers depend on the step alone


def test_a_student_can_learn_its_teacher(task):
    """One batch, learned by heart: the gradient reaches what makes the prediction, through the scale's input too."""
    made = task(EMBEDDED)
    with torch.no_grad():
        made.teacher.conv_out.weight *= 3
    batch = lambda: made.plan.part(0, 0, 1)  # noqa: E731
    optimizer = torch.optim.Adam(made.model.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        loss, _ = made.loss(made.model, batch())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_an_epsilon_model_is_taught_in_epsilon(task):
    """The loss compares predictions as they are, so nothing depends on what they predict."""
    made = task(FOLDED)
    made.wanted = lambda z, t, c, w: torch.zeros_like(z)
    loss, _ = made.loss(lambda z, t, c: type("Output", (), {"sample": z * 0 + 3}), made.plan.part(0, 0, 1))
    assert loss.item() == pytest.approx(9)


def test_grids(tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    trailing = DDIMScheduler(**recipe.teacher.scheduler)
    assert grid_timesteps(trailing, 4).tolist() == [999, 749, 499, 249]
    leading = DDIMScheduler(**recipe.teacher.scheduler | {"timestep_spacing": "leading"})
    assert grid_timesteps(leading, 4).tolist() == [751, 501, 251, 1]
    for steps, words in ((0, "choose 1 to 1000"), (1001, "choose 1 to 1000"), (61, "trailing spacing has no grid")):
        with pytest.raises(PocketfusionError, match=f"--steps is {steps}.*{words}"):
            grid_timesteps(trailing, steps)


def test_how_the_student_is_meant_to_be_sampled(tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    scheduler = DDIMScheduler(**recipe.teacher.scheduler)
    settings = guidance_settings(recipe, (2, 6))
    distilled = Sampling(num_inference_steps=8, guidance_scale=9)
    plan = lambda *given: plan_sampling(recipe, settings, scheduler, *given)  # noqa: E731
    sampling, timesteps = plan(None, None, None)  # the recipe's steps and scale, all timesteps
    assert timesteps is None and sampling.guidance == "embedded" and sampling.guidance_range == (2, 6)
    assert (sampling.num_inference_steps, sampling.guidance_scale) == (2, 4)
    sampling, timesteps = plan(distilled, None, None)  # the teacher's grid; its scale, moved into the range
    assert len(timesteps) == 8 and (sampling.num_inference_steps, sampling.guidance_scale) == (8, 6)
    sampling, timesteps = plan(distilled, 3.5, 4)
    assert len(timesteps) == 4
    assert sampling == Sampling(num_inference_steps=4, guidance_scale=3.5, guidance="folded")
    sampling, timesteps = plan(distilled, None, 1000)  # all of them
    assert timesteps is None and sampling.num_inference_steps == 8
    with pytest.raises(PocketfusionError, match="--steps is 5 but the teacher is sampled in 8"):
        plan(distilled, None, 5)
    for fixed in (1.0, float("nan"), float("inf")):
        with pytest.raises(PocketfusionError, match="--fixed is .*: choose a guidance scale above 1"):
            plan(None, fixed, None)


def test_the_folder_and_its_history(embedded, trained):
    assert read_sampling(embedded) == Sampling(
        num_inference_steps=2, guidance_scale=4, guidance="embedded", guidance_range=(1, 8)
    )
    made = read_provenance(embedded)
    assert made.stage == "distill-guidance" and made.finished and made.samples_seen == 48
    base = folder_hash(trained / "base")
    assert made.parents == {"student": base, "teacher": base}
    assert set(load_file(embedded / WEIGHTS)) == {*load_file(trained / "base" / WEIGHTS), NEW}
    assert load_file(embedded / WEIGHTS)[NEW].abs().sum() > 0


def test_stock_diffusers_draws_what_our_sampler_draws(embedded):
    """One call a step there too: diffusers passes the scale's embedding by itself."""
    stock = StableDiffusionPipeline.from_pretrained(embedded, torch_dtype=torch.float32)
    assert type(stock.unet) is UNet2DConditionModel
    torch.nn.init.normal_(stock.unet.time_embedding.cond_proj.weight, std=0.3)  # 6 steps of training hardly move it
    stock.set_progress_bar_config(disable=True)
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    networks = (stock.unet, stock.vae, TextEncoder(stock.text_encoder, stock.tokenizer), scheduler)
    calls = []
    stock.unet.register_forward_hook(lambda module, given, made: calls.append(len(given[0])))

    def ours(scale):
        settings = {"num_inference_steps": 3, "guidance_scale": scale, "guidance": "embedded"}
        return sample_images(*networks, ["a red disc"], [7], **settings)[0] / 255.0

    noise = noise_batch([7], (4, 8, 8))
    theirs = stock("a red disc", latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="np").images[0]
    assert calls == [1] * 3
    psnr = lambda a: 10 * math.log10(1 / np.mean((a - theirs) ** 2))  # noqa: E731
    assert psnr(ours(4.0)) > 40 and psnr(ours(4.0)) > psnr(ours(2.0)) + 6
    assert calls == [1] * 12


def test_two_processes_train_the_same_student(embedded, trained, tiny_recipe, tiny_data, tmp_path):
    arguments = ["-m", "pocketfusion", "distill-guidance", trained / "base", "--recipe", tiny_recipe]
    launch_two(*arguments, "--data", tiny_data, "--out", tmp_path / "two", port=29577)
    one, two = load_file(embedded / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=2e-3) for name in one)


def test_folded_from_an_embedded_teacher_on_its_grid(embedded, trained, tiny_recipe, tiny_data, tmp_path, cli):
    out = tmp_path / "folded"
    arguments = ("--recipe", tiny_recipe, "--data", tiny_data, "--out", out, "--teacher", embedded, "--fixed", "3")
    done = cli("distill-guidance", trained / "base", *arguments)
    assert done.returncode == 0, done.stderr
    assert read_sampling(out) == Sampling(num_inference_steps=2, guidance_scale=3, guidance="folded")
    assert read_provenance(out).settings["grid"] == [999, 499]
    assert load_elastic(out).config.time_cond_proj_dim is None
    assert set(load_file(out / WEIGHTS)) == set(load_file(trained / "base" / WEIGHTS))
    again = cli("distill-guidance", out, *arguments[:4], "--out", tmp_path / "no")
    assert again.returncode == 2 and "folded guidance already" in again.stderr
    taught = cli("distill-guidance", trained / "base", *arguments[:4], "--out", tmp_path / "no", "--teacher", out)
    assert taught.returncode == 2 and "one guidance scale folded in" in taught.stderr
    assert not (tmp_path / "no").exists()


def test_what_is_refused(embedded, trained, tiny_recipe, tiny_data, tmp_path, cli):
    base = shutil.copytree(trained / "base", tmp_path / "base")
    write_sampling(base, Sampling(num_inference_steps=8, guidance_scale=4))
    other = shutil.copytree(trained / "base", tmp_path / "other")
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.02}))
    bare = tmp_path / "bare.yaml"
    bare.write_text("\n".join(tiny_recipe.read_text().split("guidance:\n")[:1]))
    damaged = shutil.copytree(trained / "base", tmp_path / "damaged")
    (damaged / "sampling.json").write_text("{")
    for folder, recipe, more, words in (
        (base, tiny_recipe, ("--fixed", "4", "--guidance-range", "1,8"), "give one of them"),
        (base, tiny_recipe, ("--guidance-range", "fast"), "give two numbers as 2,14"),
        (base, tiny_recipe, ("--guidance-range", "8,2"), "the guidance range is 8 to 2"),
        (base, tiny_recipe, ("--steps", "3"), "--steps is 3 but the teacher is sampled in 8"),
        (base, tiny_recipe, ("--teacher", other), r"differ in noise schedule's beta_end (0.012 and 0.02)"),
        (damaged, tiny_recipe, (), "sampling.json is damaged"),
        (embedded, tiny_recipe, (), "has embedded guidance already"),
        (tmp_path / "no", tiny_recipe, (), "there is no model folder"),
    ):
        out = tmp_path / "out"
        done = cli("distill-guidance", folder, "--recipe", recipe, "--data", tiny_data, "--out", out, *more)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert not out.exists()
