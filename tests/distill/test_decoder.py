"""Decoder distillation: the pool of latents, the losses, the resulting folder, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torchmetrics.functional.image import structural_similarity_index_measure

from pocketfusion.data.sources import open_dataset
from pocketfusion.distill.decoder import DecoderTask, decoder_shape, distill_decoder, error_parts, ssim
from pocketfusion.distill.decoder_pool import LatentSampler, Pool, PoolSettings, decode, pool_settings
from pocketfusion.distill.decoder_pruning import prune_decoder
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_provenance
from pocketfusion.info import describe
from pocketfusion.mobile.devices import TARGETS
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.wrappers import wrap
from pocketfusion.models.dual_encoder import JudgeModel
from pocketfusion.models.guided import noise_batch
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.sampling import Sampling, read_sampling, write_sampling
from pocketfusion.models.slim_autoencoder import load_vae
from pocketfusion.recipe import DecoderDistillSettings, PictureLossSettings, TrainSettings, load_recipe
from pocketfusion.train.log import read_log
from pocketfusion.train.place import StageRun
from processes import launch_two

VAE = "vae/diffusion_pytorch_model.safetensors"
CPU = torch.device("cpu")
TRAIN = (("train", 0.75), ("train_scene", 0.25))


@pytest.fixture(scope="module")
def teacher(tiny_folder, tmp_path_factory):
    """The tiny folder with a statement on how it is sampled."""
    path = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("teacher") / "model")
    write_sampling(path, Sampling(num_inference_steps=3, guidance_scale=2.0))
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def slim(teacher, tiny_recipe, tiny_data, tmp_path_factory, cache, cli):
    """`teacher` after `distill-decoder`."""
    out = tmp_path_factory.mktemp("slim") / "slim"
    arguments = (teacher, "--recipe", tiny_recipe, "--data", tiny_data, "--out", out, "--cache", cache)
    done = cli("distill-decoder", *arguments, "--ratio", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished" in done.stdout and "val_psnr_db" in done.stdout
    return out


@pytest.fixture
def pool(teacher, tiny_data):
    settings = PoolSettings(2, (1.0, 6.0), "no", batch=5)
    return Pool(LatentSampler(teacher), settings, open_dataset(tiny_data, 64), TRAIN)


def test_the_result_is_a_model_folder_with_a_smaller_decoder(slim, teacher, tiny_recipe):
    made = read_provenance(slim)
    assert made.stage == "distill-decoder" and made.samples_seen == 24 and made.finished
    assert made.settings["block_out_channels"] == [4, 4, 8, 8]
    assert read_sampling(slim) == read_sampling(teacher)
    before, after = load_file(teacher / VAE), load_file(slim / VAE)
    encoder = [name for name in before if name.startswith(("encoder.", "quant_conv."))]
    assert encoder and all(torch.equal(before[name], after[name]) for name in encoder)
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("post_quant_conv"))
    about, whole = describe(slim), describe(teacher)
    assert about["networks"]["vae"]["class"] == "SlimAutoencoderKL" and not about["problems"]
    assert about["multiply_adds"]["decoder"] < 0.35 * whole["multiply_adds"]["decoder"]
    for name in ("unet", "text_encoder"):
        assert about["multiply_adds"][name] == whole["multiply_adds"][name]


def test_stock_pipelines_and_the_exporter_take_it(slim, teacher):
    pipeline = StableDiffusionPipeline.from_pretrained(slim, use_safetensors=True)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        picture = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
        exported = wrap(load_pipeline(slim))["decoder"]
        pictures = [
            network(z.permute(0, 2, 3, 1))["image"].permute(0, 3, 1, 2)
            for network in (exported, *(rewrite(exported, target)[0] for target in TARGETS.values()))
        ]
    assert picture.shape == (1, 3, 64, 64) and len(pictures) >= 3
    assert all(torch.allclose(one, picture, atol=1e-4) for one in pictures)


def test_a_stopped_distillation_repeats_the_uninterrupted_one(slim, teacher, tiny_recipe, tiny_data, cache, tmp_path):
    run = shutil.copytree(slim.with_name("slim.run"), tmp_path / "run")
    shutil.rmtree(sorted((run / "checkpoints").glob("step_*"))[-1])  # back to step 4
    recipe = load_recipe(tiny_recipe)
    stage = StageRun.at(tmp_path / "again", run)
    distill_decoder(recipe, open_dataset(tiny_data, 64), teacher, stage, recipe.decoder, ratio=0.5, cache=cache)
    one, two = load_file(slim / VAE), load_file(tmp_path / "again" / VAE)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_train_the_same_decoder(slim, teacher, tiny_recipe, tiny_data, tmp_path):
    out = tmp_path / "two"
    arguments = [teacher, "--recipe", tiny_recipe, "--data", tiny_data, "--out", out, "--ratio", "0.5"]
    launch_two("-m", "pocketfusion", "distill-decoder", *arguments, port=29567)
    losses = [
        [line["loss"] for line in read_log(path.with_name(f"{path.name}.run")) if "loss" in line]
        for path in (slim, out)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 6
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pictures = [load_vae(path / "vae").decode(z).sample for path in (slim, out)]
    # Not weight by weight: what a norm takes away has no gradient, and Adam makes steps of its noise.
    assert torch.allclose(*pictures, atol=2e-3)


def test_latents_are_the_stock_pipelines(pool, teacher, tmp_path):
    latents = pool.latents(3, tmp_path, CPU)
    rng = np.random.default_rng([0, 1])  # the second stream of the pool's seed
    scales = rng.uniform(1.0, 6.0, 3)
    assert np.ptp(scales) > 0.5
    pipeline = load_pipeline(teacher)
    for number, caption in enumerate(pool.captions(3)):
        stock = pipeline(
            caption,
            latents=noise_batch([(1 << 32) + number], (4, 8, 8)),
            num_inference_steps=2,
            guidance_scale=float(scales[number]),
            output_type="latent",
        ).images
        assert np.allclose(latents[number], stock[0].numpy(), atol=4e-3), number  # fp16


def test_a_pool_is_prolonged_and_resumed(pool, tmp_path):
    whole = np.array(pool.latents(12, tmp_path / "whole", CPU))
    assert not np.array_equal(whole[0], whole[1])
    begun = np.array(pool.latents(7, tmp_path / "begun", CPU))  # ends within a batch
    assert np.allclose(begun, whole[:7], atol=2e-3)
    (file,) = (tmp_path / "begun").iterdir()
    file.write_bytes(file.read_bytes()[:-100])  # killed while writing
    assert np.allclose(pool.latents(12, tmp_path / "begun", CPU), whole, atol=2e-3)
    before = file.stat().st_mtime_ns
    assert np.allclose(pool.latents(4, tmp_path / "begun", CPU), whole[:4], atol=2e-3)
    assert file.stat().st_mtime_ns == before


def test_captions_come_from_the_splits_by_their_shares(pool, tiny_data):
    rows = pool.data.rows
    found = pool.captions(640)
    scenes = {caption for row in rows if row["split"] == "train_scene" for caption in row["captions"]}
    assert set(found) <= {c for row in rows if row["split"].startswith("train") for c in row["captions"]} | scenes
    assert pool.captions(100) == found[:100]
    only = Pool(pool.sampler, pool.settings, pool.data, (("val_combo", 1.0),))
    assert set(only.captions(50)) <= {c for row in rows if row["split"] == "val_combo" for c in row["captions"]}
    assert len({pool.key, only.key}) == 2


@pytest.fixture(scope="module")
def prepared(teacher, tiny_recipe, tiny_data, cache):
    """`prepared(**settings)`: a decoder task of the tiny recipe, ready to train."""
    vae = load_vae(teacher / "vae")

    def make(**settings):
        recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
        chosen = recipe.decoder.model_copy(update=settings)
        task = DecoderTask(chosen, recipe.data, data, vae, prune_decoder(vae, decoder_shape(vae, "half", None)))
        task.encode("e", cache, CPU)
        task.prepare(LatentSampler(teacher), "v", cache, CPU)
        return task

    return make


def test_the_loss_compares_with_the_teachers_pictures(prepared):
    task, kept = (prepared(encoded_share=0.0, cache_targets=cached) for cached in (False, True))
    kept.model.load_state_dict(task.model.state_dict())
    batch = task.plan.part(0, 0, 1)
    with torch.no_grad():
        wanted = decode(task.teacher, task.latents[batch.indices], CPU)
        picture = task.model(torch.from_numpy(task.latents[batch.indices]).float() / 0.7)
    loss, logged = task.loss(task.model, batch)
    assert loss.item() == pytest.approx((picture - wanted).square().mean().item(), rel=1e-5)
    assert logged == {"mse": pytest.approx(loss.item())}  # the paper's loss is the default
    assert kept.loss(kept.model, batch)[0].item() == pytest.approx(loss.item(), rel=2e-3)  # targets kept as fp16
    loss.backward()
    assert all(p.grad is not None for p in task.model.parameters())
    assert task.teacher.encoder.conv_in.weight.grad is None


def test_a_share_of_each_batch_are_encoded_pictures_with_themselves_as_targets(prepared):
    task = prepared(encoded_share=0.5, train=load_settings(batch_size=8))
    assert task.plan.counts == [4, 3, 1]  # a quarter of the encoded ones are scenes
    batch, again = task.plan.part(4, 0, 1), task.plan.part(4, 0, 1)
    z, wanted = task.pairs(batch)
    drawn = batch.indices[:4]
    assert drawn.max() < task.settings.samples <= batch.indices[4:].min()
    assert torch.equal(z[:4], torch.from_numpy(task.latents[drawn]).float() / 0.7)
    assert torch.equal(wanted[:4], torch.from_numpy(task.targets[drawn]).float())
    mirrored, noise = again.rand() < 0.5, again.randn(4, 8, 8)
    assert 0 < mirrored[4:].sum() < 4  # else choose another step: both kinds are looked at
    rows = np.concatenate([task.data.indices([split]) for split in ("train", "train_scene")])
    pictures = rows[batch.indices[4:] - task.settings.samples]
    assert [task.data.rows[i]["split"] for i in pictures] == ["train"] * 3 + ["train_scene"]
    pixels = torch.from_numpy(task.data.images[pictures]).permute(0, 3, 1, 2) / 127.5 - 1
    pixels = torch.stack([x.flip(-1) if flip else x for x, flip in zip(pixels, mirrored[4:], strict=True)])
    assert torch.allclose(wanted[4:], pixels, atol=1e-6)
    with torch.no_grad():
        posterior = task.teacher.encode(pixels).latent_dist
    assert torch.allclose(z[4:], posterior.mean + posterior.std * noise[4:], atol=5e-3)  # kept as fp16


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_share_a_mixed_batch(prepared, parts):
    """Some have drawn latents only, some encoded pictures only: together what one process has."""
    task = prepared(encoded_share=0.5, train=load_settings(batch_size=8))
    whole = task.pairs(task.plan.part(1, 0, 1))
    split = [task.pairs(task.plan.part(1, part, parts)) for part in range(parts)]
    for values, pieces in zip(whole, zip(*split, strict=True), strict=True):
        assert torch.equal(values, torch.cat(pieces))


def load_settings(batch_size):
    return TrainSettings(steps=6, batch_size=batch_size, learning_rate=1e-3)


def test_a_share_of_less_than_one_picture_is_refused(prepared):
    with pytest.raises(PocketfusionError, match="encoded_share 0.1 of a batch of 4 is less than one picture"):
        prepared(encoded_share=0.1)


def test_features_want_a_judge_for_losses(prepared):
    with pytest.raises(PocketfusionError, match="--loss-judge"):
        prepared(loss=PictureLossSettings(feature_weight=0.1))


@pytest.mark.parametrize(
    ("settings", "sampling", "wanted"),
    [
        ({}, None, (50, (1.5, 7.0))),  # the paper's steps
        ({}, Sampling(num_inference_steps=8, guidance_scale=4), (8, (1.5, 7.0))),  # a student's own
        ({"num_inference_steps": 16}, Sampling(num_inference_steps=8, guidance_scale=4), (16, (1.5, 7.0))),
        (
            {},
            Sampling(num_inference_steps=4, guidance_scale=4, guidance="embedded", guidance_range=(2, 14)),
            (4, (2.0, 7.0)),
        ),
    ],
)
def test_a_sampler_draws_at_its_own_steps_and_scales(settings, sampling, wanted):
    how = pool_settings(DecoderDistillSettings(train=load_settings(4), **settings), sampling)
    assert (how.num_inference_steps, how.guidance_scale) == wanted


def test_scales_that_a_sampler_was_not_distilled_for_are_refused():
    sampling = Sampling(num_inference_steps=4, guidance_scale=9, guidance="embedded", guidance_range=(8, 14))
    message = "guidance_scale 1.5 to 7 lies outside of 8 to 14"
    with pytest.raises(PocketfusionError, match=message):
        pool_settings(DecoderDistillSettings(train=load_settings(4)), sampling)


def test_pictures_of_another_size_are_refused(teacher, tiny_recipe, tiny_data, tmp_path):
    recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    data.images = data.images[:, ::2, ::2]
    with pytest.raises(PocketfusionError, match="draws pictures of 64 px and the recipe tiny is for 32"):
        distill_decoder(recipe, data, teacher, StageRun.at(tmp_path / "out"), recipe.decoder)


def test_the_share_of_an_error_that_is_a_constant_offset():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.rand(4, 3, 16, 16, generator=generator) - 0.5
    noise = 0.1 * torch.randn(wanted.shape, generator=generator)
    noise -= noise.mean((2, 3), keepdim=True)
    offset = torch.tensor([0.1, -0.2, 0.05]).view(3, 1, 1)
    both, constant = noise.square().mean((1, 2, 3)) + offset.square().mean(), offset.square().mean().expand(4)
    assert torch.allclose(error_parts(wanted + offset + noise, wanted), torch.stack([both, constant], 1), rtol=1e-4)
    assert error_parts(wanted + noise, wanted)[:, 1].max() < 1e-10
    assert torch.equal(error_parts(wanted, wanted), torch.zeros(4, 2))


def test_ssim_is_the_published_measure():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 40, 32, generator=generator) * 2 - 1
    b = (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)
    theirs = structural_similarity_index_measure(a, b, data_range=2.0, reduction="none")
    assert torch.allclose(ssim(a, b), theirs, atol=1e-4)
    assert torch.allclose(ssim(a, a), torch.ones(3)) and ssim(a, b).max() < 0.99


def altered(folder, path, change):
    """A copy of `folder` whose autoencoder's tensors and config went through `change`."""
    shutil.copytree(folder, path)
    tensors, config = load_file(path / VAE), json.loads((path / "vae/config.json").read_text())
    change(tensors, config)
    save_file(tensors, path / VAE)
    (path / "vae/config.json").write_text(json.dumps(config))
    return path


def test_a_sampler_of_other_latents_is_refused(teacher, tiny_recipe, tiny_data, tmp_path):
    def change(tensors, config):
        config["scaling_factor"] = 0.5
        tensors["encoder.conv_in.weight"] += 1

    other = altered(teacher, tmp_path / "other", change)
    recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    message = r"they differ in scaling factor \(0\.7 and 0\.5\), the autoencoder's encoder: choose a --sampler"
    with pytest.raises(PocketfusionError, match=message):
        distill_decoder(recipe, data, teacher, StageRun.at(tmp_path / "out"), recipe.decoder, sampler=other)
    assert not (tmp_path / "out").exists()


def save_judge(path, text, for_losses):
    about = {"source": str(text), "max_length": 32}
    JudgeModel(64, (8, 16), text_width=32, embed_dim=8, text=about, for_losses=for_losses).save_pretrained(path)
    return path


def test_a_decoder_on_other_samplers_latents(slim, teacher, tiny_recipe, tiny_data, tmp_path):
    """The slim folder draws the same latents as its teacher: either may sample for the other."""
    recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    out, judge = tmp_path / "out", save_judge(tmp_path / "judge", teacher, for_losses=True)
    loss = PictureLossSettings(l1_weight=1, gradient_weight=0.5, feature_weight=0.1, feature_start=0.5)
    settings = recipe.decoder.model_copy(update={"preset": "tiny", "loss": loss, "num_inference_steps": None})
    places = {"sampler": slim, "loss_judge": judge, "cache": tmp_path / "cache"}
    made = distill_decoder(recipe, data, teacher, StageRun.at(out), settings, **places)
    assert made.parents["sampler"] != made.parents["folder"] and made.settings["layers_per_block"] == 0
    assert "loss_judge" in made.parents and made.settings["num_inference_steps"] == 3  # the sampler's own
    logged = [line for line in read_log(tmp_path / "out.run") if "loss" in line]
    assert ["features" in line for line in logged] == [False] * 3 + [True] * 3
    assert not any("attentions" in name for name in load_file(out / VAE) if name.startswith("decoder."))


def test_the_judge_that_scores_is_no_judge_for_losses(teacher, tiny_recipe, tiny_data, tmp_path):
    recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    settings = recipe.decoder.model_copy(update={"loss": PictureLossSettings(feature_weight=0.1)})
    judge = save_judge(tmp_path / "judge", teacher, for_losses=False)
    with pytest.raises(PocketfusionError, match="the judge that scores and must not be trained against"):
        distill_decoder(recipe, data, teacher, StageRun.at(tmp_path / "out"), settings, loss_judge=judge)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_a_ratio_out_of_range_is_refused_at_once(teacher, tiny_recipe, tiny_data, tmp_path, cli):
    arguments = ("--recipe", tiny_recipe, "--data", tiny_data, "--out", tmp_path / "out")
    done = cli("distill-decoder", teacher, *arguments, "--ratio", "1.5")
    assert done.returncode == 2 and "--ratio 1.5 is not between 0 and 1" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_a_teacher_that_gives_nan_is_refused(teacher, tiny_recipe, tiny_data, tmp_path):
    def change(tensors, config):
        tensors["decoder.conv_in.bias"][0] = float("nan")

    broken = altered(teacher, tmp_path / "broken", change)
    recipe, data = load_recipe(tiny_recipe), open_dataset(tiny_data, 64)
    with pytest.raises(PocketfusionError, match=r"the weight decoder\.conv_in\.bias holds NaN"):
        distill_decoder(recipe, data, broken, StageRun.at(tmp_path / "out"), recipe.decoder)
    vae = load_vae(teacher / "vae")  # sound weights, but too large
    vae.decoder.conv_in.weight.mul_(float("inf"))
    with pytest.raises(PocketfusionError, match="the teacher's decoder gives NaN"):
        decode(vae, np.ones((1, 4, 8, 8), np.float16), CPU)


def test_data_without_captions_is_refused(pool):
    for row in pool.data.rows:
        row["captions"] = []
    with pytest.raises(PocketfusionError, match="shapes at 64 px has no captions in train or train_scene"):
        pool.captions(4)
