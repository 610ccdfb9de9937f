"""`pocketfusion info`: bundles, model folders and single models, whole and damaged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, write_provenance
from pocketfusion.info import describe
from pocketfusion.safetensors_header import read_safetensors_header


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_bundle(run, tiny_bundle):
    code, printed, _ = run("info", tiny_bundle)
    assert code == 0
    for part in ("tiny: bundle, version 1", "SHA-256 match", "64×64 px", "unet", "SQNR", "v_prediction, trailing"):
        assert part in printed
    assert "--full names" in printed and "\nprovenance\n" not in printed
    code, printed, _ = run("info", tiny_bundle, "--full")
    assert code == 0 and "\nprovenance\n" in printed and "--full names" not in printed
    code, printed, _ = run("info", tiny_bundle, "--json")
    about = json.loads(printed)
    assert about["problems"] == [] and about["kind"] == "bundle"
    assert about["networks"]["unet"]["macs"] > about["networks"]["unet"]["parameters"] > 0
    assert about["networks"]["unet"]["size"] == (tiny_bundle / "unet.tflite").stat().st_size


def test_origin_in_short(run, folder):
    told = Provenance(
        stage="teacher",
        settings={"width": 16},
        samples_seen=12345,
        hours=1.5,
        machine="a cupboard",
        data={"name": "hats"},
    )
    write_provenance(folder, told)
    (folder / "licences").mkdir(exist_ok=True)
    (folder / "licences" / "hats.txt").write_text("MIT")
    printed = run("info", folder)[1]
    assert "made by     teacher on hats, 12,345 samples, 1.50 h on a cupboard\n" in printed
    assert "licences    1 files" in printed and "width" not in printed
    full = run("info", folder, "--full")[1]
    assert "settings.width: 16" in full and "hats.txt" in full


def test_altered_bundle_is_shown_and_exits_with_2(run, bundle):
    file = bundle / "decoder.tflite"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    code, printed, _ = run("info", bundle)
    assert code == 2 and "decoder.tflite is altered" in printed and "tiny: bundle" in printed
    code, printed, _ = run("info", bundle, "--json")
    assert code == 2 and len(json.loads(printed)["problems"]) == 1


def test_model_folder_equals_what_torch_counts(run, folder):
    from pocketfusion.mobile.pipeline_specs import multiply_adds, samples
    from pocketfusion.mobile.wrappers import wrap
    from pocketfusion.models.loading import load_pipeline

    write_provenance(folder, Provenance(stage="teacher", settings={"width": 16}, samples_seen=12345))
    pipeline = load_pipeline(folder)
    about = describe(folder)
    assert about["problems"] == [] and about["multiply_adds_note"] == ""
    for name in ("unet", "vae", "text_encoder"):
        assert about["networks"][name]["parameters"] == parameters(getattr(pipeline, name))
        assert about["networks"][name]["weights"] == "F32"
    real = wrap(pipeline)
    for name, inputs in samples(pipeline, batch=1).items():
        assert about["multiply_adds"][name] == multiply_adds(real[name], inputs)
    assert about["latents"] == {"channels": 4, "height": 8, "width": 8}
    assert about["image"] == {"height": 64, "width": 64}
    code, printed, _ = run("info", folder)
    assert code == 0
    for part in ("UNet2DConditionModel", "all weights are finite", "teacher, 12,345 samples", "MACs"):
        assert part in printed


def test_model_folder_without_torch(monkeypatch, folder):
    monkeypatch.setattr("pocketfusion.info.find_spec", lambda name: None)
    about = describe(folder)
    assert about["multiply_adds"] is None and "pip install '.[compress]'" in about["multiply_adds_note"]
    assert about["networks"]["unet"]["parameters"] > 0


def test_an_unknown_architecture_is_still_shown(folder):
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": "?"}))
    about = describe(folder)
    assert about["multiply_adds"] is None and about["multiply_adds_note"].startswith("not counted")


def test_single_model(run, tmp_path):
    from safetensors.numpy import save_file

    folder = tmp_path / "judge"
    folder.mkdir()
    save_file({"a": np.ones((3, 5), np.float16), "b": np.arange(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"_class_name": "JudgeModel"}')
    write_provenance(folder, Provenance(stage="judge", settings={}))
    code, printed, _ = run("info", folder)
    assert code == 0 and "judge: model" in printed and "JudgeModel" in printed and "made by     judge" in printed
    about = describe(folder)
    assert about["networks"]["judge"]["parameters"] == 19
    assert about["networks"]["judge"]["weights"] == "F16, I64"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_nan_in_weights(run, tmp_path, dtype):
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "m"
    folder.mkdir()
    good = torch.tensor([1.0, -2.0, 3e38 if dtype == "bfloat16" else 60000.0]).to(getattr(torch, dtype))
    bad = torch.tensor([1.0, float("nan")]).to(getattr(torch, dtype))
    (folder / "config.json").write_text("{}")
    save_file({"good": good}, folder / "model.safetensors")
    assert describe(folder)["problems"] == []
    save_file({"good": good, "bad": bad}, folder / "model.safetensors")
    code, printed, _ = run("info", folder)
    assert code == 2 and "the weight bad holds NaN or infinity" in printed and "weight good" not in printed


@pytest.mark.parametrize("keep", [0, 4, 20, 1000, -1])
def test_truncated_safetensors(run, folder, keep):
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    code, printed, notes = run("info", folder)
    assert code == 2 and printed == ""
    assert notes.startswith("error: ") and notes.count("\n") == 1 and "truncated" in notes


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"\xff"])
def test_damaged_safetensors_header(tmp_path, header):
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(PocketfusionError, match="damaged header"):
        read_safetensors_header(file)


def test_nothing_known_there(run, tmp_path, folder):
    for path, part in (
        (tmp_path / "no", "there is nothing at"),
        (tmp_path, "neither a bundle"),
        (tmp_path / "model" / "model_index.json", "is a file, not a model folder"),
        (tmp_path / "model" / "unet" / "config.json", "is JSON, not a checkpoint"),
    ):
        code, printed, notes = run("info", path)
        assert (code, printed) == (2, "") and part in notes and notes.count("\n") == 1
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    code, _, notes = run("info", folder)
    assert code == 2 and "scheduler_config.json is not valid JSON" in notes
    shutil.rmtree(folder / "unet")
    code, _, notes = run("info", folder)
    assert code == 2 and "lacks unet/" in notes
