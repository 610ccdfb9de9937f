"""What `export --for DEVICE` chooses, what its plan says before any work, and what both refuse."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import outlook
from pocketfusion.mobile.devices import DEVICES, options_for, tile_within, widest_map
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.outlook import prepare
from pocketfusion.mobile.quantization.weight_forms import quantize
from pocketfusion.models.loading import assemble, empty_part
from pocketfusion.models.sd_configs import CONFIGS
from pocketfusion.runtime.manifest import NETWORKS, Bundle
from pocketfusion.runtime.tiles import starts
from tiny_sd import make_configs, make_miniature

RECIPE = Path(__file__).parents[2] / "recipes" / "sd15-phone.yaml"


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_configs(tmp_path_factory.mktemp("sd") / "sd15")


@pytest.fixture(scope="session")
def phone(once: Any, cli: Any) -> Path:
    """What `compress recipes/sd15-phone.yaml` makes of a miniature of SD-1.5, beside the plan of each export."""

    def make(root: Path) -> None:
        recipe = yaml.safe_load(RECIPE.read_text())
        recipe["stages"]["base"] = {"from": str(make_miniature(root / "sd"))}
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        done = cli("compress", root / "recipe.yaml", root / "out", timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr

    return once("phone", make)


def chosen(folder: Path, device: str, **given: Any) -> dict[str, Any]:
    pipeline = assemble(folder, empty_part)
    ExportSettings(size=given.get("size")).resize(pipeline)
    return ExportSettings(**options_for(device, pipeline, given)).chosen()


def test_a_decoder_of_half_the_width_is_in_four_tiles_instead_of_nine() -> None:
    def vae(*widths: int) -> AutoencoderKL:
        with torch.device("meta"):
            return AutoencoderKL(**CONFIGS["sd-1.5"]["vae"] | {"block_out_channels": widths})

    half, limit = vae(64, 128, 256, 256), 64 << 20
    assert tile_within(half, 64, limit) == 40 and [len(starts(64, tile)) for tile in (40, 36, 32)] == [2, 3, 3]
    assert widest_map(half, 40, 40) <= limit < widest_map(half, 64, 64)
    assert tile_within(vae(128, 256, 512, 512), 64, limit) == 32


def test_full_size_on_a_phone_is_in_tiles_and_two_calls_and_a_small_model_is_not(
    full_size: Path, tiny_folder: Path
) -> None:
    large = chosen(full_size, "android")
    assert (large["for"], large["target"], large["gpu_fp32"]) == ("android", "litert-gpu", ["text_encoder"])
    assert (large["decoder_tile"], large["two_calls"]) == (32, True)
    assert not chosen(full_size, "android", scheduler_step=True)["two_calls"]  # which guides in one call
    assert set(large["weights"].values()) == {"int8"}
    small = chosen(tiny_folder, "android")
    assert "decoder_tile" not in small and not small["two_calls"]
    assert "decoder_tile" not in chosen(full_size, "android", size=(256, 256))
    desktop = chosen(full_size, "desktop")
    assert desktop["target"] == "litert-cpu" and "decoder_tile" not in desktop and not desktop["two_calls"]


@pytest.mark.parametrize("device", DEVICES)
def test_every_option_overrides(full_size: Path, device: str) -> None:
    gpu = DEVICES[device].target == "litert-gpu"
    said = {
        "weights": {"unet": "int4-dynamic"},
        "two_calls": not gpu,
        "gpu_fp32": (),
        "decoder_tile": 0 if gpu else 48,
    }
    found = chosen(full_size, device, **said)
    assert found["weights"] == {**DEVICES[device].weights, "unet": "int4-dynamic"}
    assert (found["two_calls"], found["gpu_fp32"], found.get("decoder_tile")) == (not gpu, [], None if gpu else 48)


def test_a_recipe_takes_the_place_of_the_devices_weights(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_text("format: pocketfusion-weights\nunet: {default: int4-dynamic}\n")
    plan = prepare(tiny_folder, tmp_path / "out", {"recipe": tmp_path / "weights.yaml"}, "desktop")
    assert [one.weights for one in plan.networks] == ["float32", "int4-dynamic", "float32"]


@pytest.mark.parametrize(
    ("device", "given", "said"),
    [
        ("android", {"target": "litert-cpu"}, "--for android is the target litert-gpu and --target is litert-cpu"),
        ("desktop", {"gpu_fp32": ("unet",)}, "--gpu-fp32 is 'unet' and the target litert-cpu"),
        ("browser", {"weights": {"unet": "float32"}}, "unet.tflite would have 3.5 GB, and --for browser loads files"),
        (
            "android",
            {"scheduler_step": True, "two_calls": True},
            "--scheduler-step guides in the UNet's graph",
        ),
        ("fridge", {}, "--for is 'fridge': choose android, iphone, browser, desktop"),
        ("android", {"decoder_tile": 65}, "the decoder's tile is 65 latents"),
    ],
)
def test_what_contradicts_a_device_is_refused(
    full_size: Path, tmp_path: Path, device: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(PocketfusionError, match=said):
        prepare(full_size, tmp_path / "out", given, device)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_or_disk_is_said_before_anything_begins(
    full_size: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = prepare(full_size, tmp_path / "out", {}, "android")
    monkeypatch.setattr(outlook, "available_memory", lambda: 64e9)
    monkeypatch.setattr("shutil.disk_usage", lambda place: namedtuple("Usage", "free")(100e9))
    plan.check(tmp_path / "out")
    monkeypatch.setattr(outlook, "available_memory", lambda: 4e9)
    with pytest.raises(PocketfusionError, match=r"needs about 1\d\.\d GB of memory and 4\.0 GB are free: .*choose"):
        plan.check(tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda place: namedtuple("Usage", "free")(1e9))
    with pytest.raises(PocketfusionError, match=r"needs about [\d,]+ MB of disk for .* and 1,000 MB are free"):
        plan.check(tmp_path / "out")


def test_full_sizes_are_those_of_the_parameters(full_size: Path, tmp_path: Path) -> None:
    plan = prepare(full_size, tmp_path / "out", {}, None)
    # float32, nothing rewritten but norms: four bytes a parameter; the decoder is without the encoder's
    parameters = {row.name: row.parameters for row in plan.networks}
    assert parameters == {"text_encoder": 123_060_480, "unet": 859_520_964, "decoder": 49_490_199}
    for row in plan.networks:
        assert 4 * row.parameters <= row.size <= 1.01 * 4 * row.parameters


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_recipe_without_training_ends_in_bundles_that_pass(phone: Path) -> None:
    made = phone / "out"
    android, desktop = (Bundle.open(made / name).manifest for name in ("export-gpu", "export"))
    assert android.provenance["export"]["for"] == "android" and desktop.provenance["export"]["for"] == "desktop"
    assert android.networks.unet.inputs[0].shape == [1, 32, 32, 4]  # two calls
    assert desktop.networks.unet.inputs[0].shape == [2, 32, 32, 4]
    graphs = json.loads((made / "check" / "check.json").read_text())["graphs"]
    assert len(graphs) == 3 and all(graph["passed"] for graph in graphs)


@pytest.mark.parametrize("form", ["float32", "int8-dynamic"])
def test_planned_sizes_are_the_files_of_a_tiny_model(
    tiny_folder: Path, tiny_bundle: Path, tmp_path: Path, form: str
) -> None:
    plan = prepare(tiny_folder, None, {"weights": dict.fromkeys(NETWORKS, form)})
    for row in plan.networks:
        file = tiny_bundle / f"{row.name}.tflite"
        if form != "float32":
            quantize(file, tmp_path / file.name, form)
            file = tmp_path / file.name
        # its graph is as large as its weights: of that the plan only knows the number of modules
        assert row.size == pytest.approx(file.stat().st_size, rel=0.2), row.name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "device"), [("export", "desktop"), ("export-gpu", "android")])
def test_planned_sizes_are_the_files(phone: Path, stage: str, device: str) -> None:
    plan = prepare(phone / "sd", phone / "out" / stage, {}, device, overwrite=True)
    files = Bundle.open(phone / "out" / stage).manifest.files
    for row in plan.networks:
        assert row.size == pytest.approx(files[row.name].size, rel=0.05), row.name
    assert plan.size == pytest.approx(sum(files[name].size for name in NETWORKS), rel=0.03)
