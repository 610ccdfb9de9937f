"""Systems by their command line, what their pictures depend on, and what each draws."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.generate import BundleSystem, ModelFolder, SamplerSettings
from pocketfusion.evaluate.systems import labels, named_systems, system_spec
from pocketfusion.models.sampling import Sampling, write_sampling
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.specs import SAMPLERS


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_steps_come_from_the_name_the_option_or_the_system(folder, tiny_bundle):
    assert [s.num_inference_steps for s in named_systems([f"{folder}@50", f"{folder}@8"])] == [50, 8]
    assert [s.num_inference_steps for s in named_systems([str(folder), str(tiny_bundle)], "50,8")] == [50, 8]
    assert [s.num_inference_steps for s in named_systems([str(folder), str(tiny_bundle)], "4")] == [4, 4]
    plain, bundle = named_systems([str(folder), str(tiny_bundle)])
    manifest = Pipeline.load(tiny_bundle, 1).manifest
    assert plain.num_inference_steps == 25
    assert bundle.num_inference_steps == manifest.defaults.num_inference_steps and bundle.kind == "bundle"
    write_sampling(folder, Sampling(num_inference_steps=6, guidance_scale=3))
    assert system_spec(folder).num_inference_steps == 6 and system_spec(folder).scales((1, 2)) == (1, 2)
    assert system_spec(folder.rename(folder.with_name("odd@8"))).num_inference_steps == 6


def test_a_system_may_name_its_sampler(folder, tiny_bundle):
    specs = named_systems([f"{folder}@8", f"{folder}@8:euler", f"{tiny_bundle}@4:dpmpp-2m"], "3")
    assert [(one.num_inference_steps, one.sampler) for one in specs] == [(8, "ddim"), (8, "euler"), (4, "dpmpp-2m")]
    assert labels(specs) == ["model@8", "model@8:euler", "tiny@4:dpmpp-2m"]
    assert specs[0].drawn_with()["sampler"] == "DDIM, eta 0; noise by numpy PCG64"  # what older stores have as key
    assert specs[1].drawn_with() == specs[0].drawn_with() | {"sampler": "euler; noise by numpy PCG64"}


def test_samplers_and_steps_that_a_system_does_not_have_are_refused_before_drawing(folder, tiny_bundle, tmp_path):
    with pytest.raises(PocketfusionError, match="number of steps is 51: choose 1 to 50 with lcm"):
        named_systems([f"{tiny_bundle}@51:lcm"])
    with pytest.raises(PocketfusionError, match="number of steps is 51: choose 1 to 50 with lcm"):
        named_systems([f"{folder}@51:lcm"])[0].open()
    student = shutil.copytree(tiny_bundle, tmp_path / "student")
    manifest = json.loads((student / "bundle.json").read_text())
    (student / "bundle.json").write_text(json.dumps(manifest | {"samplers": ["ddim"]}))
    with pytest.raises(PocketfusionError, match="timesteps that this bundle's UNet was not taught"):
        named_systems([f"{student}@4:euler"])


def test_a_bundle_draws_with_its_own_sampler(tiny_bundle, tmp_path):
    made = shutil.copytree(tiny_bundle, tmp_path / "made")
    manifest = json.loads((made / "bundle.json").read_text())
    (made / "bundle.json").write_text(json.dumps(manifest | {"sampler": "lcm"}))
    specs = named_systems([f"{made}@4", f"{made}@4:ddim", f"{tiny_bundle}@4"])
    assert [one.sampler for one in specs] == ["lcm", "ddim", "ddim"]
    assert labels(specs)[0] == "made@4:lcm"


def test_a_folded_system_has_its_own_scale_only(folder):
    write_sampling(folder, Sampling(num_inference_steps=6, guidance_scale=7.5, guidance="folded"))
    assert system_spec(folder).scales((1, 2, 4)) == (7.5,)


def test_labels_tell_systems_apart(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "b" / "model")
    assert labels(named_systems([f"{folder}@50", f"{folder}@8"])) == ["model@50", "model@8"]
    assert labels(named_systems([str(folder), str(other)], "2")) == [f"{tmp_path.name}/model@2", "b/model@2"]


@pytest.mark.parametrize(
    ("names", "steps", "message"),
    [
        (["M", "M"], None, "at 25 steps is named twice"),
        (["M@8", "M"], "8", "at 8 steps is named twice"),
        (["M", "M@8"], "8,4,2", "has 3 numbers for 2 systems"),
        (["M"], "0", "holds '0'"),
        (["M@x"], None, "holds 'x'"),
        (["M@0"], None, "holds '0'"),
        (["nothing@8"], None, "there is no model folder at nothing"),
        (["M@8:dpm++"], None, r"names the sampler 'dpm\+\+': choose ddim or euler"),
        (["M@:euler"], None, "holds ''"),
        (["M@8:euler", "M@8:euler"], None, "named twice"),
    ],
)
def test_what_is_refused(folder, names, steps, message):
    with pytest.raises(PocketfusionError, match=message):
        named_systems([name.replace("M", str(folder)) for name in names], steps)


def test_an_unknown_precision_is_refused(folder):
    with pytest.raises(PocketfusionError, match="--precision int8 is unknown"):
        named_systems([str(folder)], precision="int8")


def test_pictures_depend_on_networks_and_sampling_alone(folder):
    def drawn_with(**more):
        return system_spec(folder, **({"steps": 8} | more)).drawn_with()

    before, whole = drawn_with(), system_spec(folder, 8).sha256
    write_sampling(folder, Sampling(num_inference_steps=3, guidance_scale=2))
    (folder / "provenance.json").write_text("{}")
    (folder / "README.md").write_text("A card.")
    assert drawn_with() == before and system_spec(folder, 8).sha256 != whole
    assert drawn_with(steps=9) != before and drawn_with(precision="bf16") != before
    weights = next((folder / "vae").glob("*.safetensors"))
    tensors = load_file(weights)
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] + 1}, weights, metadata={"format": "pt"})
    assert drawn_with() != before


def test_a_bundle_draws_what_the_runtime_draws(tiny_bundle):
    system, settings = BundleSystem(tiny_bundle, 1), SamplerSettings(2, 3.0)
    images = system.draw(["a red apple", "a dog"], [5, 2**40], settings)
    pipeline = Pipeline.load(tiny_bundle, 1)
    (same,) = pipeline.generate("a red apple", seed=5, num_inference_steps=2, guidance_scale=3.0).images
    assert (images[0] == np.asarray(same)).all() and images.shape == (2, 64, 64, 3)


def test_folder_and_bundle_draw_the_same_from_one_seed(tiny_folder, tiny_bundle):
    settings = SamplerSettings(3, 2.0)
    folder, bundle = (
        s.draw(["a red apple"], [9], settings) for s in (ModelFolder(tiny_folder), BundleSystem(tiny_bundle, 1))
    )
    assert np.abs(folder.astype(int) - bundle).mean() < 1


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddim"])
def test_folder_and_bundle_draw_the_same_with_every_sampler(tiny_folder, tiny_bundle, sampler):
    """Also what noise a sampler adds: seeds beyond those of `generate` have their remainder's."""
    settings, seeds = SamplerSettings(3, 2.0, sampler=sampler), [9, 2**40 + 5]
    prompts = ["a red apple", "a dog"]
    folder = ModelFolder(tiny_folder).draw(prompts, seeds, settings)
    bundle = BundleSystem(tiny_bundle, 1).draw(prompts, seeds, settings)
    other = BundleSystem(tiny_bundle, 1).draw(prompts, seeds, SamplerSettings(3, 2.0))
    assert np.abs(folder.astype(int) - bundle).mean() < 0.5 < np.abs(other.astype(int) - bundle).mean()


def test_bf16_draws_nearly_the_same_and_not_the_same(tiny_folder):
    settings = SamplerSettings(3, 2.0)
    full, half = (ModelFolder(tiny_folder, p).draw(["a red apple"], [9], settings) for p in ("fp32", "bf16"))
    difference = np.abs(full.astype(int) - half)
    assert 0 < difference.mean() < 4


@pytest.mark.parametrize("network", ["UNet", "decoder"])
def test_nan_is_told_with_system_and_guidance(tiny_folder, network):
    system = ModelFolder(tiny_folder)
    part = system.unet if network == "UNet" else system.vae.decoder
    with torch.no_grad():
        part.conv_out.bias.fill_(float("nan"))
    with pytest.raises(
        PocketfusionError, match=rf"model: its {network} gave NaN or infinity at guidance 4.5 and 2 steps"
    ):
        system.draw(["a"], [0], SamplerSettings(2, 4.5))


def test_a_damaged_bundle_is_told_of(tiny_bundle, tmp_path):
    broken = shutil.copytree(tiny_bundle, tmp_path / "broken")
    manifest = json.loads((broken / "bundle.json").read_text())
    (broken / manifest["files"]["unet"]["path"]).write_bytes(b"short")
    with pytest.raises(PocketfusionError, match="truncated"):
        system_spec(broken)
