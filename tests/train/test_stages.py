"""The training commands from end to end on the tiny recipe, and what they refuse."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_folder, folder_hash, read_provenance, write_provenance
from pocketfusion.models.dual_encoder import load_judge
from pocketfusion.models.guided import noise_batch, sample_images, sample_latents
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.text_encoder import TextEncoder, load_text_encoder
from pocketfusion.recipe import TextSettings, load_recipe
from pocketfusion.train.judge import contrastive_loss
from pocketfusion.train.log import read_log
from pocketfusion.train.loop import train
from pocketfusion.train.place import StageRun
from pocketfusion.train.start import open_start
from pocketfusion.train.teacher import TeacherTask, train_teacher
from processes import assert_same_training, launch_two


def test_provenance_says_how_it_came_to_be(trained):
    base = read_provenance(trained / "base")
    assert base is not None and base.finished and base.samples_seen == 24 and base.stage == "train-teacher"
    assert base.parents["autoencoder"] == folder_hash(trained / "autoencoder")
    assert base.data["name"] == "shapes at 64 px" and math.isfinite(base.results["val_mse"])
    licence = (trained / "base" / "licences" / "drawings-plain.txt").read_text()
    assert "SPDX-License-Identifier: CC0-1.0" in licence and "Attribution: nobody" in licence
    autoencoder = read_provenance(trained / "autoencoder")
    assert autoencoder is not None and autoencoder.results["test_combo_psnr_db"] > 0


def test_held_out_error_by_noise_level(trained, tiny_recipe, tiny_data):
    """Every held-out pair at the same noise in each quarter of the timesteps; the mean of all by hand."""
    recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    start = open_start(trained / "base", recipe)
    task = TeacherTask(recipe, data, start.unet, start.vae, start.text)
    task.prepare(trained / "base.run" / "cache", "", start.text.fingerprint, start.device)
    found = task.validate(task.model)
    assert set(found) == {"val_mse", "val_mse_t0", "val_mse_t250", "val_mse_t500", "val_mse_t750"}
    x, noise, states = task.held_out_pairs()
    scheduler, count = DDIMScheduler(**recipe.teacher.scheduler), len(x)
    assert count == 8
    for low in (0, 250, 500, 750):
        times = torch.tensor([low + i * 250 // count for i in range(count)])
        wanted = scheduler.get_velocity(x, noise, times)
        with torch.no_grad():
            v = task.model(scheduler.add_noise(x, noise, times), times, states).sample
        assert found[f"val_mse_t{low}"] == pytest.approx((v - wanted).square().mean().item(), rel=1e-5)
    quarters = [value for name, value in found.items() if name != "val_mse"]
    assert found["val_mse"] == pytest.approx(sum(quarters) / 4, rel=1e-9)
    assert found["val_mse_t0"] != pytest.approx(found["val_mse_t750"], rel=1e-2)
    few = recipe.teacher.train.model_copy(update={"held_out": 3})
    assert len(TeacherTask(recipe, data, start.unet, start.vae, start.text, few).held_out) == 3


def test_the_first_steps_may_train_on_pictures_of_half_the_size(trained, tiny_recipe, tiny_data, tmp_path):
    recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    start = open_start(trained / "base", recipe)
    task = TeacherTask(recipe, data, start.unet, start.vae, start.text, half_size_until=0.5)
    task.prepare(tmp_path, "", start.text.fingerprint, start.device)
    sides = [task.clean(task.plan.part(step, 0, 1))[0].shape[-1] for step in range(6)]
    assert sides == [4, 4, 4, 8, 8, 8]  # of 6 steps
    picture = data.images[task.indices[3]].astype(np.float64)
    small = picture.reshape(32, 2, 32, 2, 3).mean((1, 3)) / 127.5 - 1  # means over 2x2 pixels
    pixels = torch.from_numpy(small).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        wanted = start.vae.encode(pixels).latent_dist.mean[0]
    found = task.latents.latents(task.indices[3:4], halved=True)[0, :4]
    assert np.abs(found - wanted.numpy()).max() < 2e-3  # fp16
    loss, _ = task.loss(task.model, task.plan.part(0, 0, 1))
    assert math.isfinite(loss.item())
    looked, drawn, preview = [], [], task.preview
    task.validate = lambda model: looked.append(task.held_out_pairs()[0]) or {}
    task.preview = lambda model: drawn.append(preview(model)) or drawn[-1]
    settings = recipe.teacher.train.model_copy(update={"preview_every": 3})
    train(task, settings, tmp_path / "run", fingerprint={})
    assert [x.shape[-1] for x in looked] == [4, 8]  # of the size that was trained on
    small = task.latents.latents(task.held_out, halved=True)[:, :4] * start.vae.config.scaling_factor
    assert np.allclose(looked[0], small, atol=2e-3)
    blocky = [np.asarray(picture).reshape(3 * 32, 4, 8 * 32, 4, 3) for picture in drawn]
    assert [bool((each == each[:, :1, :, :1]).all()) for each in blocky] == [True, False]  # shown in one size


def test_the_scaling_factor_gives_unit_latents(trained, tiny_data):
    from diffusers import AutoencoderKL

    from pocketfusion.models.slim_autoencoder import to_tensor

    vae = AutoencoderKL.from_pretrained(trained / "autoencoder")
    data = open_dataset(tiny_data, 64)
    with torch.no_grad():
        latents = vae.encode(to_tensor(data.images[data.indices(["train"])])).latent_dist.mean
    latents = latents * vae.config.scaling_factor
    assert latents.mean((0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=1e-3)  # the tiny recipe whitens
    assert latents.std((0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=1e-3)


def test_the_base_loads_in_stock_diffusers_and_draws_what_our_sampler_draws(trained):
    stock = StableDiffusionPipeline.from_pretrained(trained / "base", torch_dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    text = TextEncoder(stock.text_encoder, stock.tokenizer)
    ours = sample_images(
        stock.unet,
        stock.vae,
        text,
        DDIMScheduler.from_config(stock.scheduler.config),
        ["a red disc"],
        [7],
        num_inference_steps=3,
    )
    theirs = stock(
        "a red disc", latents=noise_batch([7], (4, 8, 8)), num_inference_steps=3, guidance_scale=4.0, output_type="np"
    ).images
    mse = np.mean((ours[0] / 255.0 - theirs[0]) ** 2)
    assert 10 * math.log10(1 / mse) >= 40


def test_guidance_one_runs_the_conditional_branch_alone():
    calls = []

    class Still(torch.nn.Module):
        def forward(self, sample, timestep, states):
            calls.append(len(sample))
            return type("Output", (), {"sample": sample * 0})

    unet, scheduler = Still(), DDIMScheduler()
    states = torch.zeros(2, 4, 8)
    for guidance, batch in ((1.0, 2), (3.0, 4)):
        calls.clear()
        sample_latents(
            unet, scheduler, torch.zeros(2, 4, 8, 8), states, states, num_inference_steps=2, guidance_scale=guidance
        )
        assert calls == [batch, batch]


def test_the_judge_scores(trained):
    judge = load_judge(trained / "judge")
    features, images = judge.image_features(np.zeros((3, 32, 32, 3), np.uint8))
    texts = judge.text_embeddings(["a red disc", "a blue square"])
    assert features.shape[0] == 3 and images.shape[1] == texts.shape[1] == 16
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)


def test_contrastive_loss_by_hand():
    eye = torch.eye(2)
    loss = contrastive_loss(eye, eye, torch.tensor(2.0), eye)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)), abs=1e-6)
    # the same caption twice: both pictures may match both texts
    alike = contrastive_loss(eye, eye[[0, 0]], torch.tensor(2.0), torch.ones(2, 2))
    by_hand = 0.5 * (math.log(2) + 0.5 * (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))))
    assert alike.item() == pytest.approx(by_hand, abs=1e-6)


def test_a_finished_stage_is_skipped_and_another_is_refused(trained, tiny_recipe, tiny_data, cli, tmp_path):
    again = cli("train-autoencoder", tiny_recipe, "--data", tiny_data, "--out", trained / "autoencoder")
    assert again.returncode == 0 and "training" not in again.stdout
    changed = tmp_path / "changed.yaml"
    changed.write_text(tiny_recipe.read_text().replace("kl_weight: 0.0001", "kl_weight: 0.1") + "\n")
    text = changed.read_text()
    if "kl_weight" not in text:
        changed.write_text(text.replace("autoencoder:\n", "autoencoder:\n  kl_weight: 0.1\n", 1))
    refused = cli("train-autoencoder", changed, "--data", tiny_data, "--out", trained / "autoencoder")
    assert refused.returncode == 2 and "came from other inputs" in refused.stderr


def test_continuing_from_a_folder_adds_up_the_samples(trained, tiny_recipe, tiny_data, tmp_path):
    stage = StageRun.at(tmp_path / "more")
    done = train_teacher(
        load_recipe(tiny_recipe), open_dataset(tiny_data, 64), trained / "autoencoder", stage, init=trained / "base"
    )
    assert done.samples_seen == 48 and done.parents["init"] == folder_hash(trained / "base")


def test_an_unfinished_result_goes_on_at_its_step_without_its_run_folder(trained, tiny_recipe, tiny_data, tmp_path):
    recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    shutil.copytree(trained / "base", tmp_path / "base")
    before = read_provenance(trained / "base")
    write_provenance(tmp_path / "base", before.model_copy(update={"finished": False, "samples_seen": 16}))
    stage = StageRun.at(tmp_path / "base")
    done = train_teacher(recipe, data, trained / "autoencoder", stage)
    assert done.finished and done.samples_seen == 24
    log = [line["step"] for line in read_log(stage.run) if "loss" in line]
    assert log == [5, 6]  # not from the beginning
    ours, theirs = (
        UNet2DConditionModel.from_pretrained(path / "base", subfolder="unet") for path in (tmp_path, trained)
    )
    moved = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert 0 < moved < 0.01  # two small steps from its own weights, where another beginning is far away

    write_provenance(tmp_path / "base", before.model_copy(update={"finished": False, "samples_seen": 16, "seed": 5}))
    other = recipe.model_copy(update={"teacher": recipe.teacher.model_copy(update={"prompt_dropout": 0.5})})
    stage = StageRun.at(tmp_path / "base", tmp_path / "again.run", overwrite=True)
    train_teacher(other, data, trained / "autoencoder", stage)
    assert [line["step"] for line in read_log(stage.run) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_two_processes_train_the_same_teacher(trained, tiny_recipe, tiny_data, tmp_path):
    arguments = ["-m", "pocketfusion", "train-teacher", tiny_recipe, "--data", tiny_data, "--out", tmp_path / "base"]
    launch_two(*arguments, "--autoencoder", trained / "autoencoder", port=29572)
    recipe = load_recipe(tiny_recipe)
    torch.manual_seed(recipe.teacher.train.seed)
    save_file(UNet2DConditionModel(**recipe.teacher.unet).state_dict(), tmp_path / "before.safetensors")
    file = "unet/diffusion_pytorch_model.safetensors"
    assert_same_training(trained / "base" / file, tmp_path / "base" / file, tmp_path / "before.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("steps: 6", "steps: 0"), "greater than 0"),
        (("in_channels: 4", "in_channels: 5"), "in_channels is 5"),
        (("name: tiny", "name: tiny\nspeed: 9"), "speed"),
        (("name: tiny", "name: [tiny"), "not valid YAML"),
    ],
)
def test_bad_recipes_are_named(tiny_recipe, tiny_data, trained, tmp_path, cli, change, words):
    text = tiny_recipe.read_text()
    assert change[0] in text
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace(*change))
    more = ("--autoencoder", trained / "autoencoder")
    done = cli("train-teacher", bad, "--data", tiny_data, "--out", tmp_path / "out", *more)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_inputs_are_named(tiny_recipe, tiny_data, tmp_path, cli):
    for arguments, words in (
        ((tmp_path / "no.yaml", "--data", tiny_data, "--out", tmp_path / "out"), "there is no recipe"),
        ((tiny_recipe, "--data", tmp_path / "no", "--out", tmp_path / "out"), "there is no data folder"),
        ((tiny_recipe, "--data", tiny_data, "--out", tmp_path / "no" / "out"), "does not exist"),
        ((tiny_recipe, "--data", tiny_data, "--out", "/proc/out"), "cannot write into /proc"),
        ((tiny_recipe, "--data", tiny_data, "--out", tmp_path / "out", "--max-minutes", "-1"), "--max-minutes"),
    ):
        done = cli("train-autoencoder", *arguments)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_folder_checks(tiny_folder, tmp_path):
    with pytest.raises(PocketfusionError, match="no model folder"):
        check_folder(tmp_path / "no")
    with pytest.raises(PocketfusionError, match="no model_index.json"):
        check_folder(tmp_path)
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    (copy / "provenance.json").write_text("{")
    with pytest.raises(PocketfusionError, match="provenance.json is damaged"):
        read_provenance(copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(PocketfusionError, match="could not be loaded"):
        load_pipeline(copy)
    length = int.from_bytes(whole[:8], "little")
    name, entry = next((n, e) for n, e in json.loads(whole[8 : 8 + length]).items() if n != "__metadata__")
    start = 8 + length + entry["data_offsets"][0]
    weights.write_bytes(whole[:start] + np.float32("nan").tobytes() + whole[start + 4 :])
    with pytest.raises(PocketfusionError, match=f"the weight {name} holds NaN"):
        load_pipeline(copy)
    weights.unlink()
    (copy / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(PocketfusionError, match="is pickled and is never read"):
        check_folder(copy)
    shutil.rmtree(copy / "vae")
    with pytest.raises(PocketfusionError, match="lacks vae/"):
        check_folder(copy)


def test_minilm_comes_from_its_package():
    text = load_text_encoder(TextSettings())
    states, mask = text.encode(["a red apple", "a crimson apple", "quantum chromodynamics lecture"])
    assert states.shape == (3, 32, 384) and mask.sum(1).tolist() == [5, 5, mask[2].sum().item()]
    pooled = torch.stack([s[m.bool()].mean(0) for s, m in zip(states, mask, strict=True)])
    near = torch.cosine_similarity(pooled[0], pooled[1], dim=0)
    far = torch.cosine_similarity(pooled[0], pooled[2], dim=0)
    assert near > 0.7 and far < 0.3  # a sentence model that means something, not random weights
