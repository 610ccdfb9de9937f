"""Smaller weights: sizes, the outlier rule and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import gate
from pocketfusion.mobile.convert import DEFAULT_SIGNATURE, convert
from pocketfusion.mobile.flatbuffer import operations, read, weights
from pocketfusion.mobile.quantization.weight_forms import MIN_WEIGHT_SQNR, quantize, rounding_sqnr


class _Net(nn.Module):
    """Two linear layers; each row of the second holds an outlier 20 times the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.good = nn.Linear(64, 512)
        self.outlier = nn.Linear(512, 64)
        self.outlier.weight.data[:, 0] = self.outlier.weight.data.abs().mean() * 20

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.outlier(torch.tanh(self.good(x)))}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.tflite"
    convert(_Net(), {"x": torch.zeros(2, 64)}, path)
    return path


def test_a_file_holds_one_signature_and_one_copy_of_the_weights(exact: Path) -> None:
    assert len(operations(exact)) == 1
    parameters = (2 * 64 * 512 + 512 + 64) * 4
    assert parameters < exact.stat().st_size < 1.5 * parameters


@pytest.mark.parametrize(("kind", "least", "share"), [("float16", 50.0, 0.65), ("int8", 30.0, 0.5)])
def test_quantized_file_is_smaller_and_near(
    exact: Path, tmp_path: Path, kind: str, least: float, share: float
) -> None:
    quantize(exact, tmp_path / "small.tflite", kind)
    x = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    reference = gate.run(exact, [{"x": x}], "y", DEFAULT_SIGNATURE)
    small = gate.run(tmp_path / "small.tflite", [{"x": x}], "y", DEFAULT_SIGNATURE)
    assert least < gate.sqnr(reference, small) < 100
    assert (tmp_path / "small.tflite").stat().st_size < share * exact.stat().st_size


def test_float16_for_the_gpu_leaves_embedding_tables_float32(tmp_path: Path) -> None:
    """The delegate refuses a lookup in a float16 table (docs/check.md)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(40, 16), nn.Linear(16, 8)

        def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.layer(self.table(ids))}

    convert(Net(), {"ids": torch.zeros(1, 4, dtype=torch.int32)}, tmp_path / "net.tflite")
    for device, table in (("litert-gpu", "float32"), ("litert-cpu", "float16")):
        forms = quantize(tmp_path / "net.tflite", tmp_path / "small.tflite", "float16", device)
        assert forms == {"table": table, "layer": "float16"}


def test_outlier_layer_is_the_one_that_stays_float16(exact: Path) -> None:
    values = {round(rounding_sqnr(w.values), 1) for w in weights(read(exact))}
    assert len(values) == 2  # two layers
    assert min(values) < MIN_WEIGHT_SQNR < max(values)


def test_rounding_sqnr_by_hand() -> None:
    exact_rows = np.array([[127.0, 1.0], [0.0, 0.0]])  # on the grid, and a row of zeros
    assert rounding_sqnr(exact_rows) == 200.0
    assert rounding_sqnr(np.array([[127.0, 0.5]])) == pytest.approx(10 * np.log10((127**2 + 0.25) / 0.25))


def test_a_damaged_file_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.tflite").write_bytes(b"not a flatbuffer at all")
    with pytest.raises(PocketfusionError, match="bad.tflite cannot be given other weights"):
        quantize(tmp_path / "bad.tflite", tmp_path / "out.tflite", "int8")
    assert not (tmp_path / "out.tflite").exists()
