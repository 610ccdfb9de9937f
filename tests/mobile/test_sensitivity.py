"""Simulated quantisation against packed files' arithmetic, sensitivities, and choices under a budget by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from pocketfusion.cli import app
from pocketfusion.cli import compress_commands as _  # noqa: F401  (registers the command
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import folder_hash
from pocketfusion.mobile.quantization.mixed_precision import (
    candidates,
    for_quality,
    for_size,
    plan,
    stored_bytes,
)
from pocketfusion.mobile.quantization.packing import Form
from pocketfusion.mobile.quantization.sensitivity import (
    Effect,
    Layer,
    Sensitivity,
    decibels,
    quantizable,
    rounded_activations,
    simulated,
)
from pocketfusion.mobile.quantization.weight_forms import WeightRecipe


def test_activations_are_rounded_per_token_and_per_picture() -> None:
    x = torch.tensor([[[0.0, 255.0], [-1.0, 1.55]]])
    by_token = rounded_activations(x, "FULLY_CONNECTED")
    assert by_token[0, 0].tolist() == [0.0, 255.0]  # a grid of ones
    assert by_token[0, 1].tolist() == pytest.approx([-1.0, 1.55], abs=0.0051)  # a grid of a hundredth
    whole = rounded_activations(x.reshape(1, 1, 2, 2), "CONV_2D").reshape(-1)
    assert whole.tolist() == pytest.approx([0.0, 255.0, -1.0, 2.0], abs=0.02)  # one grid of 256/255


def test_a_simulated_network_computes_with_rounded_weights_and_is_restored() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    exact = {name: p.clone() for name, p in network.named_parameters()}
    x = torch.randn(5, 4)
    expected = network(x)
    with simulated(network, {"0": "int8"}):
        weight = exact["0.weight"]
        scale = weight.abs().amax(1, keepdim=True) / 127
        by_hand = torch.round(weight / scale).clamp(-127, 127) * scale
        assert torch.allclose(network[0].weight, by_hand, atol=1e-7)
        assert not torch.equal(network(x), expected)
    assert all(torch.equal(p, exact[name]) for name, p in network.named_parameters())
    with simulated(network, {"0": "int8-dynamic"}, "litert-gpu"):
        on_gpu = network(x)
    with simulated(network, {"0": "int8"}):
        assert torch.equal(network(x), on_gpu)  # the delegate unpacks dynamic weights
    with simulated(network, {"0": "int8-dynamic"}):
        assert not torch.equal(network(x), on_gpu)


def _layer(name: str, parameters: int, macs: int, **noises: float) -> Layer:
    effects: dict[Form, Effect] = {
        key.replace("_", "-"): Effect(noise=value / 10, direction_noise=value)  # type: ignore[misc]
        for key, value in noises.items()
    }
    return Layer(name=name, operation="CONV_2D", parameters=parameters, channels=0, macs=macs, effects=effects)


LAYERS = [
    _layer("a", 1000, 100, int8_dynamic=0.010, int8=0.001, float16=0.0),
    _layer("b", 1000, 900, int8_dynamic=0.008, int8=0.0005, float16=0.0),
    _layer("time_embedding.linear_1", 10, 1, int8_dynamic=0.5, int8=0.1, float16=0.0),
]
FORMS: tuple[Form, ...] = ("int8-dynamic", "int8", "float16")


def test_the_direction_counts_where_it_is_worse() -> None:
    assert LAYERS[0].effects["int8"].worst == 0.001
    assert decibels(0.001) == pytest.approx(30) and decibels(0) == 200


def test_quality_budget_gives_up_the_cheap_layers_speed_first() -> None:
    options = candidates("unet", LAYERS, FORMS, "litert-cpu")
    assert [choice.form for choice in options["unet", "time_embedding.linear_1"]] == ["float16"]  # always kept

    def forms(noise: float) -> list[Form]:
        chosen = for_quality(options, noise)
        assert chosen is not None
        return [choice.form for choice in chosen.values()]

    assert forms(0.02) == ["int8-dynamic", "int8-dynamic", "float16"]
    # a loses 0.009 of noise for a tenth of the work, b 0.0075 for nine tenths: a goes first
    assert forms(0.01) == ["int8", "int8-dynamic", "float16"]
    assert forms(0.002) == ["int8", "int8", "float16"]
    assert forms(0.0) == ["float16", "float16", "float16"]
    assert for_quality({k: v[:1] for k, v in options.items()}, 0.001) is None


def test_on_the_gpu_only_bytes_cost() -> None:
    options = candidates("unet", LAYERS[:2], ("int8-dynamic", "float16"), "litert-gpu")
    assert [choice.cost for choice in options["unet", "a"]] == [1000 / 8000, 2000 / 8000]


def test_size_budget() -> None:
    options = candidates("unet", LAYERS[:2], ("int8", "float16"), "litert-cpu")
    chosen = for_size(options, 3500)
    assert [choice.form for choice in chosen.values()] == ["float16", "int8"]  # a's noise is the larger
    assert sum(choice.bytes for choice in chosen.values()) == 3000
    with pytest.raises(PocketfusionError, match=r"--max-mb is 0.0015, but the weights take 0.00 MB at least"):
        for_size(options, 1500)
    assert stored_bytes(LAYERS[0], "int4-dynamic") == 500


@pytest.fixture(scope="module")
def analysed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe at 30 dB and its analysis, by the command."""
    root = tmp_path_factory.mktemp("quantize")
    arguments = ["quantize", str(tiny_folder), str(root / "r.yaml"), "--min-sqnr", "30", "--samples", "2"]
    arguments += ["--analysis", str(root / "a.json"), "--plot", str(root / "p.png"), "--json", str(root / "f.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "most sensitive in the unet" in result.output
    return root


def test_command_writes_a_recipe_of_every_layer(analysed: Path, tiny_folder: Path) -> None:
    from pocketfusion.models.loading import load_pipeline

    recipe = WeightRecipe.load(analysed / "r.yaml")
    assert recipe.model == folder_hash(tiny_folder) and recipe.target == "litert-cpu"
    layers = list(quantizable(load_pipeline(tiny_folder).unet))
    forms = recipe.unet.forms(layers)
    assert set(forms) == set(layers)
    assert not any("pooler" in rule.match for rule in recipe.text_encoder.rules)  # not in the exported network
    assert forms["time_embedding.linear_1"] == forms["conv_in"] == "float16"
    assert "int8-dynamic" in forms.values()
    assert (analysed / "p.png").read_bytes().startswith(b"\x89PNG")


def test_budgets_are_kept_and_an_analysis_is_used_again(analysed: Path, tiny_folder: Path) -> None:
    seen: list[str] = []
    made = plan(
        tiny_folder, min_sqnr=35, samples=2, analysis=analysed / "a.json",
        progress=lambda stage, index, count: seen.append(stage),
    )  # fmt: skip
    assert all(network.measured_db >= 35 for network in made.networks)
    before = Sensitivity.load(analysed / "a.json")
    assert made.sensitivity.networks == before.networks  # nothing was measured again, so nothing moved
    most = plan(tiny_folder, max_mb=1e3, samples=2, analysis=analysed / "a.json")
    budget = 0.7 * sum(network.size for network in most.networks)
    least = plan(tiny_folder, max_mb=budget / 1e6, samples=2, analysis=analysed / "a.json")
    assert sum(network.size for network in least.networks) <= budget
    assert all(a.measured_db <= b.measured_db for a, b in zip(least.networks, most.networks, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_sqnr": 190}, r"--min-sqnr is 190 dB, but the text encoder reaches \d+\.\d dB at best"),
        ({"max_mb": 0.001}, r"--max-mb is 0.001, but the weights take \d+\.\d\d MB at least"),
        ({}, "give one budget"),
        ({"min_sqnr": 30, "max_mb": 3}, "give one budget"),
        ({"min_sqnr": -3}, "--min-sqnr is -3"),
        ({"min_sqnr": 30, "forms": ["int3"]}, "--forms has 'int3'"),
        ({"min_sqnr": 30, "samples": 3}, "is an analysis of 2 samples"),
        ({"min_sqnr": 30, "target": "litert-gpu"}, "is an analysis of target litert-cpu"),
    ],
)
def test_what_no_recipe_meets_is_told(analysed: Path, tiny_folder: Path, settings: dict, message: str) -> None:
    with pytest.raises(PocketfusionError, match=message):
        plan(tiny_folder, **({"samples": 2, "analysis": analysed / "a.json"} | settings))


def test_an_existing_recipe_is_kept(analysed: Path, tiny_folder: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(tiny_folder), str(analysed / "r.yaml"), "--min-sqnr", "20"])
    assert isinstance(result.exception, PocketfusionError) and "exists already" in str(result.exception)


def test_packed_layers_bear_the_simulated_ones_names(tiny_bundle: Path, tiny_folder: Path) -> None:
    """A recipe made in PyTorch finds its layers in the file: every one of them, and no other."""
    from pocketfusion.mobile.flatbuffer import read, weights
    from pocketfusion.models.loading import load_pipeline

    layers = set(quantizable(load_pipeline(tiny_folder).unet))
    assert {weight.module for weight in weights(read(tiny_bundle / "unet.tflite"))} == layers


def test_simulated_is_what_the_packed_file_computes(tiny_bundle: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from pocketfusion.mobile import gate, pipeline_specs
    from pocketfusion.mobile.convert import DEFAULT_SIGNATURE
    from pocketfusion.mobile.quantization.packing import pack
    from pocketfusion.mobile.wrappers import wrap
    from pocketfusion.models.loading import load_pipeline

    pipeline = load_pipeline(tiny_folder)
    network, samples = wrap(pipeline)["unet"], pipeline_specs.samples(pipeline, 2)["unet"]
    call = {name: value.numpy() for name, value in samples.items()}

    def noise(form: Form) -> tuple[float, float]:
        pack(tiny_bundle / "unet.tflite", tmp_path / "u.tflite", lambda weight: form)
        packed = gate.run(tmp_path / "u.tflite", [call], "noise_pred", DEFAULT_SIGNATURE)[0]
        with torch.no_grad():
            exact = network(**samples)["noise_pred"].numpy()
            with simulated(pipeline.unet, {name: form for name in quantizable(pipeline.unet)}):
                made = network(**samples)["noise_pred"].numpy()
        return gate.sqnr(exact, np.asarray(packed)), gate.sqnr(exact, made)

    for form in ("int8", "int8-dynamic", "int4-dynamic"):
        packed, made = noise(form)  # type: ignore[arg-type]
        assert made == pytest.approx(packed, abs=1.5)  # dB: what the converter folds has other scales
