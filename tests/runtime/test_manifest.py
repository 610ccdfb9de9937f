"""Opening bundles: the good one, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.pipeline import Pipeline


def test_good_bundle_opens_and_its_hash_names_its_content(bundle, edit):
    first = Bundle.open(bundle)
    assert first.manifest.image.width == 64
    assert list(first.problems()) == []
    edit(lambda m: m.update(name="other"))
    assert Bundle.open(bundle).hash != first.hash


def refused(path: Path, match: str, **kwargs) -> None:
    with pytest.raises(PocketfusionError, match=match) as caught:
        Bundle.open(path, **kwargs)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_manifest(tmp_path):
    refused(tmp_path / "nowhere", "there is no bundle at .*nowhere")
    refused(tmp_path, "not a bundle: it has no bundle.json")
    (tmp_path / "model.safetensors").touch()
    refused(tmp_path / "model.safetensors", "not a bundle: .*pocketfusion export .*model.safetensors OUT$")
    (tmp_path / "model_index.json").touch()
    refused(tmp_path, "not a bundle: it is a model folder; make one of it with pocketfusion export")


@pytest.mark.parametrize("content", ["{", "", "[" * 100_000, "\xff"])
def test_invalid_json(bundle, content):
    (bundle / "bundle.json").write_bytes(content.encode("latin-1"))
    refused(bundle, "not valid JSON")


@pytest.mark.parametrize("content", ["[]", "3", '{"format": "onnx"}'])
def test_another_kind_of_json(bundle, content):
    (bundle / "bundle.json").write_text(content)
    refused(bundle, "not a bundle's manifest")


def test_newer_version(bundle, edit):
    edit(lambda m: m.update(version=2, surprise=1))
    refused(bundle, "version 2, made by a newer pocketfusion.*upgrade")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(surprise=1), "surprise: Extra inputs"),
        (lambda m: m.pop("latents"), "latents: Field required"),
        (lambda m: m["latents"].update(height=0), "latents.height"),
        (lambda m: m["scheduler"].update(prediction_type="sample"), "scheduler.prediction_type"),
        (lambda m: m["files"].pop("unet"), "no file is given for unet"),
        (lambda m: m["files"].update(empty_prompt_embeds=m["files"]["tokenizer"]), "not of the size of the text enc"),
        (lambda m: m["defaults"].update(num_inference_steps=1001), "num_inference_steps is above"),
        (lambda m: m["defaults"].update(guidance_scale=float("nan")), "defaults.guidance_scale"),
        (lambda m: m.update(sampler="heun"), "sampler: Input should be 'ddim', 'euler'"),
        (lambda m: m.update(samplers=["euler"]), "sampler is ddim, which samplers"),
        (lambda m: m.update(samplers=[]), "sampler is ddim, which samplers"),
        (lambda m: m.update(sampler="lcm") or m["defaults"].update(num_inference_steps=51), "51, but lcm has 50"),
        (lambda m: m["scheduler"].update(final_sigmas_type="one"), "scheduler.final_sigmas_type"),
        (lambda m: m["scheduler"].update(eta=1.01), "scheduler.eta"),
        (lambda m: m["files"]["unet"].update(sha256="abc"), "files.unet.sha256"),
        (lambda m: m.update(version="1"), "version"),
    ],
)
def test_manifest_that_breaks_a_rule(bundle, edit, change, match):
    edit(change)
    refused(bundle, match)


@pytest.mark.parametrize("path", ["/etc/passwd", "../unet.tflite", "a/../../unet.tflite", "C:\\x", "", "..\\x"])
def test_path_that_leaves_the_bundle(bundle, edit, path):
    edit(lambda m: m["files"]["unet"].update(path=path))
    refused(bundle, "leaves the bundle", verify=False)


@pytest.mark.parametrize("link", ["file", "folder"])
def test_symlink_out_of_the_bundle(bundle, edit, tmp_path, link):
    (tmp_path / "outside").mkdir()
    target = tmp_path / "outside" / "unet.tflite"
    os.replace(bundle / "unet.tflite", target)
    if link == "file":
        (bundle / "unet.tflite").symlink_to(target)
    else:
        (bundle / "sub").symlink_to(target.parent)
        edit(lambda m: m["files"]["unet"].update(path="sub/unet.tflite"))
    refused(bundle, "a link that leaves the bundle", verify=False)


def test_missing_truncated_and_altered_file(bundle):
    file = bundle / "decoder.tflite"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    refused(bundle, "decoder.tflite is truncated: it has")
    file.write_bytes(content + b"x")
    refused(bundle, "decoder.tflite is altered: it has")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(bundle, "decoder.tflite is altered: its SHA-256")
    Bundle.open(bundle, verify=False)
    file.unlink()
    refused(bundle, "decoder.tflite is missing")


@pytest.mark.parametrize("keep", [0, 10, 5000, -100])
def test_truncated_tflite_with_a_matching_hash(bundle, sign, keep):
    file = bundle / "unet.tflite"
    file.write_bytes(file.read_bytes()[:keep])
    sign("unet")
    with pytest.raises(PocketfusionError, match="LiteRT cannot load .*unet.tflite") as caught:
        Pipeline.load(bundle, 1)
    assert "\n" not in str(caught.value)


def test_network_that_is_not_what_the_manifest_says(bundle, edit):
    def swap(manifest):
        files = manifest["files"]
        files["unet"], files["decoder"] = files["decoder"], files["unet"]

    edit(swap)
    with pytest.raises(PocketfusionError, match="decoder.tflite has no signature .*sample.*export the bundle again"):
        Pipeline.load(bundle, 1)


def test_embedded_bundle_is_found_or_its_absence_told(monkeypatch, tmp_path):
    monkeypatch.setattr("pocketfusion.runtime.manifest.__file__", str(tmp_path / "pocketfusion/runtime/manifest.py"))
    with pytest.raises(PocketfusionError, match="no embedded bundle"):
        embedded_bundle()
    folder = tmp_path / "pocketfusion/bundles/emoji"
    folder.mkdir(parents=True)
    (folder / "bundle.json").write_text(json.dumps({}))
    assert embedded_bundle() == folder


def unet_input(manifest, old, **new):
    """Replaces a UNet input of the manifest by one with `new` values, or appends it if there is none called `old`."""
    inputs = manifest["networks"]["unet"]["inputs"]
    kept = next((tensor for tensor in inputs if tensor["name"] == old), None)
    if kept is None:
        inputs.append({"dtype": "float32", **new})
    else:
        kept.update(new)


EMBEDDING = {"dim": 16, "flip_sin_to_cos": True, "downscale_freq_shift": 0.0}


def test_later_keys_are_read_and_left_out_where_they_say_nothing(bundle, edit):
    plain = Bundle.open(bundle).manifest.contents()
    assert plain == json.loads((bundle / "bundle.json").read_text())
    assert {"target", "time_embedding", "guidance"}.isdisjoint(plain)
    assert all("gpu_precision" not in network for network in plain["networks"].values())

    def change(manifest):
        manifest.update(target="litert-gpu", time_embedding=EMBEDDING)
        unet_input(manifest, "timestep", name="timestep_embedding", shape=[2, 16])
        unet_input(manifest, "step_coefficients", name="step_coefficients", shape=[1, 3])
        manifest["networks"]["unet"].update(weights="int8-dynamic", gpu_precision="fp32")

    edit(change)
    manifest = Bundle.open(bundle).manifest
    assert manifest.target == "litert-gpu" and manifest.networks.unet.gpu_precision == "fp32"
    assert manifest.time_embedding.dim == 16
    assert manifest.contents() == json.loads((bundle / "bundle.json").read_text())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(target="tpu"), "target"),
        (lambda m: m["networks"]["unet"].update(weights="int3"), "networks.unet.weights"),
        (lambda m: m["networks"]["unet"].update(gpu_precision="int8"), "networks.unet.gpu_precision"),
        (lambda m: m.update(time_embedding=EMBEDDING), "timestep_embedding go together"),
        (lambda m: unet_input(m, "timestep", name="timestep_embedding", shape=[2, 16]), "go together"),
        (
            lambda m: (
                m.update(time_embedding={**EMBEDDING, "dim": 8}),
                unet_input(m, "timestep", name="timestep_embedding", shape=[2, 16]),
            ),
            r"time_embedding.dim is 8, the UNet takes \[2, 16\]",
        ),
        (
            lambda m: (
                unet_input(m, "encoder_hidden_states", shape=[1, 32, 32]),
                unet_input(m, "step_coefficients", name="step_coefficients", shape=[1, 3]),
            ),
            "lacks the second row that guidance needs",
        ),
        (
            lambda m: m["networks"]["decoder"]["inputs"][0].update(shape=[1, 16, 8, 4]),
            "tiles of 16x8 latents, larger than the picture's 8x8",
        ),
    ],
)
def test_later_keys_that_break_a_rule(bundle, edit, change, match):
    edit(change)
    refused(bundle, match)


def test_what_a_sampler_adds_to_the_manifest_is_only_there_where_it_says_something(bundle, edit):
    old = Bundle.open(bundle).manifest.contents()
    assert "sampler" not in old and "samplers" not in old
    assert not {"final_sigmas_type", "eta"} & old["scheduler"].keys()
    edit(lambda m: m.update(sampler="euler", samplers=["ddim", "euler"]))
    edit(lambda m: m["scheduler"].update(final_sigmas_type="sigma_min", timestep_spacing="linspace", eta=0.5))
    manifest = Bundle.open(bundle).manifest
    assert manifest.contents() == json.loads((bundle / "bundle.json").read_text())


def test_a_step_in_the_graph_rules_out_samplers_that_remember(bundle, edit):
    unet = {"name": "step_coefficients", "shape": [1, 3], "dtype": "float32"}
    edit(lambda m: m["networks"]["unet"]["inputs"].append(unet))
    Bundle.open(bundle)
    edit(lambda m: m.update(sampler="dpmpp-2m"))
    refused(bundle, "sampler is dpmpp-2m, which samplers or the UNet's step_coefficients rule out")
