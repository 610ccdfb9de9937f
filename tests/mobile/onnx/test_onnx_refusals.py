"""What an ONNX export, and a bundle given to the wrong runtime, are told: one sentence each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import target_options
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.outlook import prepare
from pocketfusion.runtime import runtimes
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import Pipeline


def refused(folder: Path, message: str, **given: Any) -> None:
    with pytest.raises(PocketfusionError, match=message):
        prepare(folder, None, {"target": "onnx", **given})


def test_the_export_names_its_extra(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_options, "find_spec", lambda name: None if name == "onnxscript" else object())
    refused(tiny_folder, r"--target onnx needs onnxscript: pip install '\.\[compress,onnx\]'")


@pytest.mark.parametrize(("runtime", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_the_runtime_names_its_extra(
    runtime: str, extra: str, onnx_bundle: Path, monkeypatch: pytest.MonkeyPatch, run: Callable
) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    code, _, err = run("generate", "a", "--bundle", onnx_bundle, "--runtime", runtime)
    assert code == 2 and f"needs {runtime}, which is not installed: pip install '.[{extra}]'" in " ".join(err.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weights": {"unet": "palette6"}}, "'palette6' weights for 'unet' are not known to onnx: choose float32, f"),
        ({"weights": {"unet": "int8-dynamic"}}, "'int8-dynamic' weights for 'unet' are not known to onnx"),
        ({"recipe": Path("recipe.yaml")}, "--recipe is of LiteRT's targets"),
        (
            {"layout": "apple"},
            "--layout is 'apple' and the target onnx: its files are laid out as bundle or diffusers",
        ),
        ({"layout": "diffusers"}, "--layout diffusers is of models with CLIP's text encoder .* has 'bert'"),
        ({"layout": "diffusers", "decoder_tile": 4}, "--layout diffusers has no --decoder-tile"),
        ({"ios": 17}, "--ios is 17 and the target onnx: it is of coreml"),
        ({"gpu_fp32": ("unet",)}, "the target onnx: it is of litert-gpu"),
    ],
)
def test_options_of_other_targets(given: dict[str, Any], message: str, tiny_folder: Path) -> None:
    refused(tiny_folder, message, **given)


def test_the_plan_knows_its_forms(tiny_folder: Path) -> None:
    weights = {"text_encoder": "float16", "unet": "int8"}
    found = prepare(tiny_folder, None, {"target": "onnx", "weights": weights})
    assert [row.weights for row in found.networks] == ["float16", "int8", "float32"]
    encoder, unet, decoder = ((row.size - 600 * row.modules) / row.parameters for row in found.networks)
    assert encoder == pytest.approx(2, rel=0.1) and unet < encoder < decoder


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "{}"),
        ("check", "{}"),
        ("device-pack", "{}", "{out}"),
        ("vectors", "{}", "{out}"),
        ("web-build", "{out}", "{}"),
    ],
)
def test_what_takes_literts_bundles_alone(
    arguments: tuple[str, ...], onnx_bundle: Path, tmp_path: Path, run: Callable
) -> None:
    out = tmp_path / "out"
    code, _, err = run(*(str(one).format(onnx_bundle, out=out) for one in arguments))
    assert code == 2 and not out.exists()
    assert "was exported for ONNX Runtime, and this takes bundles for LiteRT" in " ".join(err.split())


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_runtime_that_does_not_take_the_bundle(
    command: str, tiny_bundle: Path, onnx_bundle: Path, run: Callable
) -> None:
    for bundle, runtime, message in (
        (
            tiny_bundle,
            "onnxruntime",
            "which takes litert: leave the runtime out, or export the model with --target onnx",
        ),
        (onnx_bundle, "litert", "is a bundle for onnx, which takes onnxruntime or openvino or openvino-bf16"),
        (onnx_bundle, "tensorrt", "the runtime is 'tensorrt': choose litert, onnxruntime, openvino or openvino-bf16"),
    ):
        given = ("a", "--bundle", bundle) if command == "generate" else (bundle,)
        code, _, err = run(command, *given, "--runtime", runtime)
        assert code == 2 and message in " ".join(err.split())


def test_settings_of_litert(onnx_bundle: Path) -> None:
    with pytest.raises(PocketfusionError, match="choose a mode instead of a memory budget"):
        Pipeline.load(onnx_bundle, memory_budget=500)
    with pytest.raises(PocketfusionError, match="the accelerator is gpu, and onnxruntime runs on the CPU here"):
        Pipeline.load(onnx_bundle, accelerator="gpu")
    with pytest.raises(
        PocketfusionError, match="a cache of packed weights is LiteRT's, and the runtime is onnxruntime"
    ):
        Pipeline.load(onnx_bundle, cache="cache")


def test_files_that_are_not_what_the_manifest_says(onnx_bundle: Path, tmp_path: Path) -> None:
    spec = Pipeline.load(onnx_bundle, 1, mode="sequential").manifest.networks
    with pytest.raises(
        PocketfusionError, match=r"cannot load .*unet.onnx \(its tensors are not those of the manifest"
    ):
        Network(onnx_bundle / "unet.onnx", spec.decoder, 1, runtime="onnxruntime")
    (tmp_path / "unet.onnx").write_bytes((onnx_bundle / "unet.onnx").read_bytes()[:100_000])
    with pytest.raises(PocketfusionError, match="onnxruntime cannot load .*: export the bundle again"):
        Network(tmp_path / "unet.onnx", spec.unet, 1, runtime="onnxruntime")
    encoder = Network(onnx_bundle / "text_encoder.onnx", spec.text_encoder, 1, runtime="onnxruntime")
    with pytest.raises(PocketfusionError, match="text_encoder.onnx cannot be run"):
        encoder(input_ids=np.full((1, 77), 50_000, np.int32), attention_mask=np.ones((1, 77), np.int32))


def test_weights_outside_the_bundle_are_not_read(onnx_bundle: Path, tmp_path: Path) -> None:
    """ONNX files may name other files: one that names a file beside the bundle's folder reads nothing of it."""
    import onnx

    spec = Pipeline.load(onnx_bundle, 1, mode="sequential").manifest.networks.decoder
    model = onnx.load(str(onnx_bundle / "decoder.onnx"))
    (tmp_path / "b").mkdir()
    largest = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    (tmp_path / "secret").write_bytes(largest.raw_data)
    largest.ClearField("raw_data")
    largest.data_location = onnx.TensorProto.EXTERNAL
    largest.external_data.add(key="location", value="../secret")
    (tmp_path / "b" / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(PocketfusionError, match="onnxruntime cannot load"):
        Network(tmp_path / "b" / "decoder.onnx", spec, 1, runtime="onnxruntime")


def test_a_manifest_of_another_target(onnx_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(onnx_bundle, tmp_path / "b")
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(manifest | {"target": "litert-gpu"}))
    with pytest.raises(PocketfusionError, match="the target is litert-gpu, and onnx is there"):
        Pipeline.load(bundle)


def test_drawing_loads_no_torch(onnx_bundle: Path, tmp_path: Path) -> None:
    from test_imports import HEAVY, RUN, loaded_by

    out = str(tmp_path / "p.png")
    given = ["generate", "a", "--bundle", str(onnx_bundle), "--steps", "1", "-o", out]
    loaded = loaded_by(RUN.format(given))
    assert "onnxruntime" in loaded and Path(out).exists()
    assert loaded.isdisjoint({*HEAVY, "onnx", "onnxscript", "openvino"})


def test_diffusers_layout_of_other_latents(onnx_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(onnx_folder, tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 16}))
    with pytest.raises(PocketfusionError, match="is of latents of 4 channels, and .* has 16: choose --layout bundle"):
        target_options.check_onnx_options(ExportSettings(target="onnx", layout="diffusers"), folder)
