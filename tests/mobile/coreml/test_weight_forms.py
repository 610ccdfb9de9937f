"""Weights of Core ML programs in smaller forms: what the executor unpacks is what coremltools does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pocketfusion.mobile.coreml import mlpackage
from pocketfusion.mobile.coreml.compression import compress
from pocketfusion.mobile.coreml.executor import Executor
from pocketfusion.mobile.gate import sqnr

#: By form: bits a weight, the operation that unpacks them, and what it keeps of such weights at least, in dB.
FORMS = {
    (17, "int8"): (8, "constexpr_affine_dequantize", 38),
    (17, "palette6"): (6, "constexpr_lut_to_dense", 28),
    (17, "palette4"): (4, "constexpr_lut_to_dense", 16),
    (18, "int8"): (8, "constexpr_blockwise_shift_scale", 38),
    (18, "palette4"): (4, "constexpr_lut_to_dense", 16),
    (18, "int4-block"): (4, "constexpr_blockwise_shift_scale", 16),
}
SAMPLES = {"x": torch.randn(1, 64, 3, 3, generator=torch.Generator().manual_seed(0))}


class Two(nn.Module):
    """A layer that forms are for, and one that stays float16 by its name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.conv_out = nn.Conv2d(64, 64, 1, bias=False), nn.Conv2d(64, 64, 1, bias=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": self.body(x), "b": self.conv_out(x)}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    from pocketfusion.mobile.coreml.program import convert
    from pocketfusion.mobile.devices import TARGETS

    folder = tmp_path_factory.mktemp("forms")
    for ios in (17, 18):
        convert(Two(), SAMPLES, folder / f"{ios}.mlpackage", TARGETS["coreml"], ios)
    return {ios: folder / f"{ios}.mlpackage" for ios in (17, 18)}


@pytest.mark.parametrize(("ios", "form"), FORMS)
def test_weights_are_unpacked_as_coremltools_does(ios: int, form: str, exact: dict[int, Path], tmp_path: Path) -> None:
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    bits, operation, least = FORMS[ios, form]
    small, dense = tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage"
    compress(exact[ios], small, form, ios, Two())
    stored = [one.type for one in mlpackage.read_program(small)[1].operations]
    assert stored.count(operation) == 1 and sum(one.startswith("constexpr") for one in stored) == 1
    saved = mlpackage.size(exact[ios]) - mlpackage.size(small)
    assert saved == pytest.approx(64 * 64 * (16 - bits) / 8, abs=1500)  # scales, palettes and the graph's text
    mlpackage.save(cto.decompress_weights(ct.models.MLModel(str(small), skip_model_load=True)), dense)
    inputs = {"x": SAMPLES["x"].numpy()}
    found, plain, original = (Executor(path)(**inputs) for path in (small, dense, exact[ios]))
    np.testing.assert_allclose(found["a"], plain["a"], rtol=1e-3, atol=1e-3)  # coremltools' own sums are in fp16
    np.testing.assert_array_equal(found["b"], original["b"])  # kept
    with torch.no_grad():
        assert sqnr(Two()(**SAMPLES)["a"].numpy(), found["a"]) > least


def test_a_palette_has_its_number_of_colours(exact: dict[int, Path], tmp_path: Path) -> None:
    """By hand: with one-hot pictures the layer's outputs are its weights, of which there are 16 different ones."""
    compress(exact[17], tmp_path / "p.mlpackage", "palette4", 17, Two())
    program = mlpackage.read_program(tmp_path / "p.mlpackage")[1]
    (palette,) = [one for one in program.operations if one.type == "constexpr_lut_to_dense"]
    assert mlpackage.Constants(tmp_path / "p.mlpackage").value(palette.attributes["lut"]).numel() == 16
    picture = np.zeros((1, 64, 3, 3), np.float32)
    picture[0, 5] = 1
    weights = Executor(tmp_path / "p.mlpackage")(x=picture)["a"][0, :, 0, 0]
    exact_weights = Two().body.weight.detach().numpy()[:, 5, 0, 0]
    assert len(np.unique(weights)) <= 16
    assert np.abs(weights - exact_weights).max() < 0.05 * np.abs(Two().body.weight.detach().numpy()).max() * 4


def test_a_weight_with_an_outlier_stays_float16_in_int8(tmp_path: Path) -> None:
    from pocketfusion.mobile.coreml.program import convert
    from pocketfusion.mobile.devices import TARGETS

    module = Two()
    module.body = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    with torch.no_grad():
        module.body.weight[:, 0, 0, 0] = torch.linspace(0.9, 1.1, 64)  # the scale leaves little for the others
    convert(module, SAMPLES, tmp_path / "e.mlpackage", TARGETS["coreml"])
    compress(tmp_path / "e.mlpackage", tmp_path / "s.mlpackage", "int8", 17, module)
    stored = [one.type for one in mlpackage.read_program(tmp_path / "s.mlpackage")[1].operations]
    assert not any(one.startswith("constexpr") for one in stored)


def test_channels_that_do_not_divide_by_16_share_a_palette(tmp_path: Path) -> None:
    """For iOS 18 coremltools would leave such weights in float16: an embedding table of 30,522 rows, say."""
    from pocketfusion.mobile.coreml.program import convert
    from pocketfusion.mobile.devices import TARGETS

    module = Two()
    module.body = nn.Conv2d(64, 40, 1, bias=False)
    convert(module, SAMPLES, tmp_path / "e.mlpackage", TARGETS["coreml"], 18)
    compress(tmp_path / "e.mlpackage", tmp_path / "s.mlpackage", "palette4", 18, module)
    (palette,) = [
        one
        for one in mlpackage.read_program(tmp_path / "s.mlpackage")[1].operations
        if one.type == "constexpr_lut_to_dense"
    ]
    assert mlpackage.Constants(tmp_path / "s.mlpackage").value(palette.inputs["lut"].arguments[0].value).numel() == 16
    inputs = {"x": SAMPLES["x"].numpy()}
    exact, found = (Executor(tmp_path / f"{name}.mlpackage")(**inputs)["a"] for name in "es")
    assert sqnr(exact, found) > 16
