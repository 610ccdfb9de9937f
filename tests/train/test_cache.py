"""What training reads of a cache: latents and captions' states, on pictures or in their place; the commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from made_pictures import photo_shards
from safetensors.torch import load_file, save_file

from pocketfusion.data.sources import open_dataset, open_training_data
from pocketfusion.errors import PocketfusionError
from pocketfusion.recipe import load_recipe
from pocketfusion.train.cache import CaptionTable, LiveStates
from pocketfusion.train.start import open_start
from pocketfusion.train.teacher import TeacherTask


def test_earlier_captions_are_taken_as_often_as_the_docstring_says():
    table = CaptionTable([{"captions": ["a"]}, {"captions": ["b", "a"]}, {"captions": ["c", "b", "a"]}])
    u = (np.arange(10_000) + 0.5) / 10_000
    for row, wanted in enumerate(({"a": 1.0}, {"b": 0.63, "a": 0.37}, {"c": 0.48, "b": 0.28, "a": 0.24})):
        picked = [table.captions[i] for i in table.pick(np.full(len(u), row), u)]
        assert {caption: round(picked.count(caption) / len(u), 2) for caption in wanted} == wanted


@pytest.fixture(scope="module")
def tasks(trained, tiny_recipe, tiny_data, tmp_path_factory):
    """The base's task on pictures, and on the cache that was made of them."""
    recipe, folder = load_recipe(tiny_recipe), tmp_path_factory.mktemp("latents")
    start, data = open_start(trained / "base", recipe), open_dataset(tiny_data, 64)

    def task(data, **text):
        changed = recipe.model_copy(update={"text": recipe.text.model_copy(update=text)})
        made = TeacherTask(changed, data, start.unet, start.vae, start.text)
        made.prepare(folder, start.vae_hash, start.text.fingerprint, start.device)
        return made

    plain = task(data)
    return plain, task, open_training_data(next(folder.glob("latents-*")), 64), start


def test_a_cache_takes_the_place_of_its_pictures(tasks):
    """The same samples, latents, mirrors and captions, to the bit; another autoencoder's is refused."""
    plain, task, cache, start = tasks
    assert (cache.name, cache.fingerprint) == (plain.data.name, plain.data.fingerprint)
    other = task(cache)
    for step in (0, 3):
        for one, two in zip(*(made.clean(made.plan.part(step, 0, 1)) for made in (plain, other)), strict=True):
            assert torch.equal(one, two)
    assert all(torch.equal(one, two) for one, two in zip(plain.held_out_pairs(), other.held_out_pairs(), strict=True))
    with pytest.raises(PocketfusionError, match="holds latents of another autoencoder"):
        other.prepare(cache.path, "0" * 64, start.text.fingerprint, start.device)
    other.half_steps = 3
    with pytest.raises(PocketfusionError, match="no latents of half-size pictures"):
        other.prepare(cache.path, start.vae_hash, start.text.fingerprint, start.device)


def test_latents_are_the_encoders_of_each_picture_and_its_mirror(tasks):
    plain, _, cache, start = tasks
    indices, turned = np.array([5, 40, 41]), np.array([True, False, True])
    pictures = np.asarray(plain.data.images[indices])
    pictures = np.where(turned[:, None, None, None], pictures[:, :, ::-1], pictures)
    with torch.no_grad():
        found = start.vae.encode(torch.from_numpy(pictures / 127.5 - 1).float().permute(0, 3, 1, 2)).latent_dist
    wanted = torch.cat([found.mean, found.std], 1).numpy()
    assert np.abs(cache.latents(indices, turned) - wanted).max() < 2e-3 * np.abs(wanted).max()  # fp16


def test_states_may_be_computed_when_they_are_needed(tasks):
    """The same captions; their states differ by rounding alone."""
    plain, task, cache, _ = tasks
    live = task(cache, cache_states=False)
    assert isinstance(live.states, LiveStates)
    for step in (1, 2):
        (x, states), (wanted_x, wanted) = (made.clean(made.plan.part(step, 0, 1)) for made in (live, plain))
        assert torch.equal(x, wanted_x) and torch.allclose(states, wanted, atol=2e-3)
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "sd15.yaml")
    assert not recipe.text.cache_states and "cache_states" not in recipe.text.model_dump()


@pytest.fixture(scope="module")
def bucketed(trained, once, cli) -> Path:
    """A cache of two buckets by the command, in two parts of three."""

    def make(root: Path) -> None:
        data = photo_shards(root / "data", 3, 8, shapes=((64, 64), (48, 64)))
        for part in ("2/3", "1/3", "3/3"):
            done = cli(
                *("data", "cache", data, root / "c", "--vae", trained / "autoencoder", "--size", 64),
                *("--aspect", "1:1", "--aspect", "3:4", "--part", part),
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "8 pictures encoded" in done.stdout
            assert ("parts are still to be made" in done.stdout) == (part != "3/3")
        assert "64x64 (12), 56x72 (12)" in done.stdout and "val_combo 2" in done.stdout
        shutil.rmtree(data)

    return once("bucketed", make) / "c"


def test_training_on_buckets_resumes_to_the_sample(bucketed, trained, tiny_recipe, kill, end, tmp_path):
    """`train-elastic` on a cache whose pictures are gone: killed and gone on with, it ends with the same weights."""
    train = ("train-elastic", trained / "base", "--recipe", tiny_recipe, "--data", bucketed, "--out")
    end(*train, tmp_path / "whole")
    kill("pocketfusion.train.checkpoint:CheckpointWriter._write", 2, *train, tmp_path / "again")
    end(*train, tmp_path / "again")
    one, two = (load_file(tmp_path / name / "unet/diffusion_pytorch_model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert "val_mse" in (tmp_path / "whole" / "provenance.json").read_text()


@pytest.fixture
def of_128(tiny_recipe, tmp_path_factory):
    """A recipe for larger pictures."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["data"]["size"] = 128
    (file := tmp_path_factory.mktemp("recipe") / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return file


@pytest.fixture
def other(trained, tmp_path_factory):
    """The base with another autoencoder."""
    made = shutil.copytree(trained / "base", tmp_path_factory.mktemp("other") / "base")
    weights = load_file(file := made / "vae" / "diffusion_pytorch_model.safetensors")
    weights["encoder.conv_in.weight"] *= 2
    save_file(weights, file, {"format": "pt"})
    return made


def test_the_commands_of_a_cache(bucketed, trained, tiny_recipe, of_128, other, cli, tmp_path):
    shown = cli("data", "show-cache", bucketed, "--verify")
    assert shown.returncode == 0 and "24 pictures as latents" in shown.stdout and "SHA-256 matches" in shown.stdout
    for arguments, match in (
        (
            ("train-judge", tiny_recipe, "--data", bucketed, "--out", tmp_path / "x"),
            "without pictures, and this needs",
        ),
        (
            ("evaluate", trained / "base", "--judge", trained / "judge", "--data", bucketed, "--out", tmp_path / "x"),
            "without pictures, and this needs",
        ),
        (
            ("data", "cache", bucketed, tmp_path / "x", "--vae", trained / "autoencoder", "--size", 64),
            "latents already",
        ),
        (
            ("data", "cache", "ftp://x/y", tmp_path / "x", "--vae", tmp_path, "--size", 64),
            "of a kind that is not read",
        ),
        (("data", "cache", bucketed, tmp_path / "x", "--vae", tmp_path, "--size", 64, "--part", "3/2"), "give K/N"),
        (
            ("train-elastic", trained / "base", "--recipe", of_128, "--data", bucketed, "--out", tmp_path / "x"),
            "is a cache of pictures of 64 px and the recipe's data.size is 128: make one with --size 128",
        ),
        (
            ("train-elastic", other, "--recipe", tiny_recipe, "--data", bucketed, "--out", tmp_path / "y"),
            "holds latents of another autoencoder",
        ),
    ):
        done = cli(*arguments)
        said = " ".join(done.stderr.split())
        assert done.returncode == 2 and match in said and "Traceback" not in said, said
    assert not any(path.is_file() and path.name != "run.json" for path in tmp_path.rglob("*"))


def test_a_recipe_takes_a_cache_for_its_pictures(bucketed, trained, tiny_recipe, end, cli, tmp_path):
    """`data: {from: CACHE}`: stages in latents run; one that needs pictures says so."""
    recipe = yaml.safe_load(tiny_recipe.read_text())
    recipe["stages"] = {"data": {"from": str(bucketed)}, "base": {"from": str(trained / "base")}, "elastic": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    end("compress", tmp_path / "recipe.yaml", tmp_path / "out")
    recorded = json.loads((tmp_path / "out/elastic/provenance.json").read_text())["data"]
    assert recorded["fingerprint"] == open_training_data(bucketed, 64).fingerprint
    recipe["stages"] |= {"judge": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = cli("compress", tmp_path / "recipe.yaml", tmp_path / "out")
    assert done.returncode == 2 and "without pictures, and this needs them" in " ".join(done.stderr.split())
