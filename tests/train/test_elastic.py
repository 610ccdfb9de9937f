"""Robust training and recovery: which blocks are left out, what is learned, what comes out, what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from pocketfusion.data.sources import open_dataset
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import folder_hash, read_provenance
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic.transfer import with_architecture
from pocketfusion.models.elastic_unet import ElasticUNet, load_elastic
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.writing import copy_with_unet
from pocketfusion.recipe import ElasticSettings, load_recipe
from pocketfusion.train.batch import BatchPlan
from pocketfusion.train.elastic import ElasticTask, RobustTrainer, draw_skipped, train_elastic
from pocketfusion.train.loop import train
from pocketfusion.train.place import StageRun
from pocketfusion.train.recovery import RecoveryTask, StageFeatures, feature_loss, recover
from pocketfusion.train.start import open_start
from processes import assert_same_training, launch_two

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def elastic(trained, tiny_recipe, tiny_data, cli):
    """The tiny base after `train-elastic`."""
    out = trained / "elastic"
    done = cli("train-elastic", trained / "base", "--recipe", tiny_recipe, "--data", tiny_data, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def smaller(elastic, tmp_path_factory):
    """`elastic` without two blocks, not trained since."""
    unet = load_elastic(elastic)
    for name in ("down_blocks.0.attentions.0", "up_blocks.2.resnets.1"):
        unet = with_architecture(unet, unet.architecture.remove(name))
    out = tmp_path_factory.mktemp("smaller") / "model"
    out.mkdir()
    copy_with_unet(elastic, out, unet)
    return out


def test_blocks_are_left_out_as_often_as_their_kind_says(trained, tiny_recipe):
    config = load_elastic(trained / "base").config
    architecture = Architecture.stock(config)
    train = load_recipe(tiny_recipe).elastic.train
    settings = ElasticSettings(attention_drop=0.3, resnet_drop=0.1, ramp_steps=4, train=train)
    rng, counts, rounds = np.random.default_rng(0), {"attentions": 0, "resnets": 0}, 2000
    for _ in range(rounds):
        for name in draw_skipped(architecture, settings, rng.random(38), step=10):
            counts["attentions" if "attentions" in name else "resnets"] += 1
    assert counts["attentions"] / (16 * rounds) == pytest.approx(0.3, abs=0.01)
    assert counts["resnets"] / (22 * rounds) == pytest.approx(0.1, abs=0.01)
    u = np.full(38, 0.2)  # between the two probabilities
    assert all("attentions" in name for name in draw_skipped(architecture, settings, u, step=10))
    assert len(draw_skipped(architecture, settings, u, step=10)) == 16
    assert not draw_skipped(architecture, settings, u, step=0)  # the ramp: a quarter of 0.3 is below 0.2


def test_a_step_trains_only_the_blocks_that_it_runs(trained, tiny_recipe, tiny_data, tmp_path):
    recipe = load_recipe(tiny_recipe)
    start = open_start(trained / "base", recipe)
    settings = recipe.elastic.model_copy(update={"attention_drop": 0.5, "resnet_drop": 0.5, "ramp_steps": 0})
    task = ElasticTask(recipe, settings, open_dataset(tiny_data, 64), start)
    task.prepare(tmp_path, start.vae_hash, start.text.fingerprint, torch.device("cpu"))
    batch, again = task.plan.part(3, 0, 1), task.plan.part(3, 0, 1)
    skipped = draw_skipped(start.unet.architecture, settings, again.shared(38).numpy(), 3)
    assert 8 < len(skipped) < 30
    loss, logged = task.loss(start.unet, batch)
    loss.backward()
    assert logged["skipped"] == pytest.approx(len(skipped) / 38) and not start.unet.skipped
    for name in start.unet.architecture.names():
        gradients = {key: p.grad for key, p in start.unet.block(name).named_parameters()}
        if name in skipped:
            assert all(g is None for key, g in gradients.items() if "shortcut" not in key), name
        else:
            assert all(g is not None for g in gradients.values()), name


def test_all_parts_of_a_step_leave_out_the_same_blocks():
    plan = BatchPlan([(np.arange(64), 1.0)], 8, seed=1)
    whole, halves = plan.part(5, 0, 1), [plan.part(5, i, 2) for i in range(2)]
    numbers = whole.shared(38)
    assert all(torch.equal(half.shared(38), numbers) for half in halves)


def test_the_result_is_a_stock_folder_with_its_history(elastic, trained):
    made = read_provenance(elastic)
    assert made.stage == "train-elastic" and made.samples_seen == 48
    assert made.parents == {"base": folder_hash(trained / "base")}
    stock = UNet2DConditionModel.from_pretrained(elastic, subfolder="unet")
    assert type(stock) is UNet2DConditionModel  # nothing is removed yet: no class of ours is needed
    before, after = load_file(trained / "base" / WEIGHTS), load_file(elastic / WEIGHTS)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert folder_hash(elastic / part) == folder_hash(trained / "base" / part)


def test_a_stopped_training_repeats_the_uninterrupted_one(elastic, trained, tiny_recipe, tiny_data, tmp_path, cli):
    arguments = ("train-elastic", trained / "base", "--recipe", tiny_recipe, "--data", tiny_data)
    run = shutil.copytree(elastic.with_name("elastic.run"), tmp_path / "run")
    shutil.rmtree(sorted((run / "checkpoints").glob("step_*"))[-1])  # back to step 4
    done = cli(*arguments, "--out", tmp_path / "again", "--run", run)
    assert done.returncode == 0, done.stderr
    one, two = load_file(elastic / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_train_the_same_network(elastic, trained, tiny_recipe, tiny_data, tmp_path):
    arguments = ["-m", "pocketfusion", "train-elastic", trained / "base", "--recipe", tiny_recipe, "--data", tiny_data]
    launch_two(*arguments, "--out", tmp_path / "two", port=29574)
    assert_same_training(elastic / WEIGHTS, tmp_path / "two" / WEIGHTS, trained / "base" / WEIGHTS)


def test_an_evolved_folder_loads_in_diffusers(smaller):
    pipeline = StableDiffusionPipeline.from_pretrained(smaller, torch_dtype=torch.float32)
    assert isinstance(pipeline.unet, ElasticUNet)
    assert "down_blocks.0.attentions.0" not in pipeline.unet.architecture.names()
    assert isinstance(load_pipeline(smaller).unet, ElasticUNet)
    assert "down_blocks.0.attentions.0" not in str(load_file(smaller / WEIGHTS).keys())


def test_feature_loss_by_hand():
    student = [torch.tensor([[1.0, 3.0], [1.0, 2.0]]), torch.zeros(2, 3)]
    teacher = [torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 1.0]])]
    # samples of the first stage: (0 + 4)/2 over a mean square of 1, (1 + 0)/2 over 4; of the second: all of it
    assert feature_loss(student, teacher).item() == pytest.approx(((2 + 1 / 8) / 2 + 1) / 2)
    assert feature_loss([student[0], torch.zeros(2, 1)], teacher).item() == pytest.approx((2 + 1 / 8) / 2)
    parts = [feature_loss([s[i : i + 1] for s in student], [t[i : i + 1] for t in teacher]) for i in range(2)]
    assert torch.stack(parts).mean().item() == pytest.approx(feature_loss(student, teacher).item())


def test_features_are_those_of_every_stage(elastic):
    unet = load_elastic(elastic)
    features = StageFeatures(unet)
    with torch.no_grad():
        out = unet(torch.randn(1, 4, 8, 8), 5, torch.randn(1, 4, 32)).sample
    taken = features.take()
    assert len(taken) == 9 and [f.shape[-1] for f in taken] == [4, 2, 1, 1, 1, 2, 4, 8, 8]
    with torch.no_grad():
        assert torch.equal(unet.conv_out(unet.conv_act(unet.conv_norm_out(taken[-1]))), out)
    assert features.take() == []


def test_a_network_recovers_nothing_from_itself(elastic, tiny_recipe, tiny_data, tmp_path):
    recipe = load_recipe(tiny_recipe)
    start, base = open_start(elastic, recipe), open_start(elastic, recipe)
    task = RecoveryTask(recipe, recipe.recovery, open_dataset(tiny_data, 64), start, base.unet)
    task.prepare(tmp_path, start.vae_hash, start.text.fingerprint, torch.device("cpu"))
    loss, logged = task.loss(start.unet, task.plan.part(0, 0, 1))
    assert logged["output"] == 0 and logged["features"] == 0 and logged["mse"] > 0
    loss.backward()
    assert all(p.grad is None for p in base.unet.parameters())


def test_recovery_in_parts_trains_the_same_network(smaller, elastic, tiny_recipe, tiny_data, tmp_path):
    recipe, ends = load_recipe(tiny_recipe), {}
    settings = recipe.recovery.model_copy(update={"task_weight": 0.0, "output_weight": 0.0})
    for parts in (1, 2, 4):
        start, base = open_start(smaller, recipe), open_start(elastic, recipe)
        task = RecoveryTask(recipe, settings, open_dataset(tiny_data, 64), start, base.unet)
        task.prepare(tmp_path, start.vae_hash, start.text.fingerprint, torch.device("cpu"))
        task.to(torch.device("cpu"))
        task.validate, task.preview = (lambda model: {}), (lambda model: Image.new("RGB", (1, 1)))
        short = settings.train.model_copy(update={"steps": 2, "warmup_steps": 0, "gradient_accumulation": parts})
        before = torch.cat([value.flatten() for value in start.unet.state_dict().values()])
        train(task, short, tmp_path / f"run-{parts}", fingerprint={})
        ends[parts] = torch.cat([value.flatten() for value in start.unet.state_dict().values()]) - before
    for parts in (2, 4):
        assert (ends[parts] - ends[1]).norm() < 0.02 * ends[1].norm()


def test_recovery_keeps_the_architecture_and_the_history(smaller, elastic, tiny_recipe, tiny_data, tmp_path, cli):
    arguments = ("--base", elastic, "--recipe", tiny_recipe, "--data", tiny_data, "--out", tmp_path / "out")
    done = cli("recover", smaller, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_elastic(tmp_path / "out").architecture == load_elastic(smaller).architecture
    made = read_provenance(tmp_path / "out")
    assert made.parents == {"student": folder_hash(smaller), "base": folder_hash(elastic)}
    log = [json.loads(line) for line in (tmp_path / "out.run" / "log.jsonl").read_text().splitlines()]
    assert any("features" in line for line in log)


def test_the_robust_trainer_trains_what_it_is_given(smaller, tiny_recipe, tiny_data, tmp_path):
    trainer = RobustTrainer(load_recipe(tiny_recipe), open_dataset(tiny_data, 64), smaller, tmp_path / "cache")
    unet = load_elastic(smaller)
    architecture = unet.architecture.remove("mid_block.attentions.0")
    before = with_architecture(unet, architecture)
    after = trainer.train(with_architecture(unet, architecture), tmp_path / "run", steps=2, seed=7)
    again = trainer.train(with_architecture(unet, architecture), tmp_path / "run2", steps=2, seed=7)
    assert after.architecture == architecture
    pairs = [(before.state_dict()[k], v, again.state_dict()[k]) for k, v in after.state_dict().items()]
    assert any(not torch.equal(a, b) for a, b, _ in pairs) and all(torch.equal(b, c) for _, b, c in pairs)


def test_every_round_of_robust_training_draws_anew_and_a_resumed_one_the_same(
    smaller, tiny_recipe, tiny_data, tmp_path
):
    recipe, data, drawn = load_recipe(tiny_recipe), open_dataset(tiny_data, 64), {}

    def trainer(name: str) -> RobustTrainer:
        made = RobustTrainer(recipe, data, smaller, tmp_path / "cache")
        loss, drawn[name] = made.task.loss, []
        made.task.loss = lambda model, batch: (drawn[name].append(batch.indices.tolist()), loss(model, batch))[1]
        return made

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train(load_elastic(smaller), tmp_path / "round-1", steps=2, seed=0)
    one = whole.train(load_elastic(smaller), tmp_path / "round-2", steps=2, seed=1).state_dict()
    two = resumed.train(load_elastic(smaller), tmp_path / "again", steps=2, seed=1).state_dict()
    assert drawn["whole"][:2] != drawn["whole"][2:] == drawn["resumed"]
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_refused(trained, elastic, tiny_recipe, tiny_data, tmp_path, cli):
    text = tiny_recipe.read_text()
    values = yaml.safe_load(text)
    bare = tmp_path / "bare.yaml"
    bare.write_text(yaml.safe_dump({name: value for name, value in values.items() if name != "elastic"}))
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("v_prediction", "epsilon"))
    strange = shutil.copytree(trained / "base", tmp_path / "strange")
    config = json.loads((strange / "unet" / "config.json").read_text())
    (strange / "unet" / "config.json").write_text(json.dumps({**config, "addition_embed_type": "text_time"}))
    data, stage = open_dataset(tiny_data, 64), StageRun.at(tmp_path / "out")
    for folder, recipe, words in (
        (trained / "base", bare, "has no section 'elastic'"),
        (trained / "base", other, "teacher.scheduler.prediction_type is 'epsilon'"),
        (strange, tiny_recipe, "addition_embed_type is 'text_time'"),
    ):
        with pytest.raises(PocketfusionError, match=words):
            train_elastic(load_recipe(recipe), data, folder, stage)
    mixed = shutil.copytree(trained / "base", tmp_path / "mixed")
    file = mixed / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(
        {**weights, "encoder.conv_in.bias": weights["encoder.conv_in.bias"] + 1}, file, metadata={"format": "pt"}
    )
    with pytest.raises(PocketfusionError, match="have different latents"):
        recover(load_recipe(tiny_recipe), data, elastic, mixed, stage)
    done = cli(
        "train-elastic", trained / "no", "--recipe", tiny_recipe, "--data", tiny_data, "--out", tmp_path / "out"
    )
    assert done.returncode == 2 and "there is no model folder" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
