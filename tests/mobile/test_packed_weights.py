"""Packed weights against the stock quantizer, byte for byte; files beyond 2 GB; names of layers."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import nn

from pocketfusion.mobile import flatbuffer, gate
from pocketfusion.mobile.convert import DEFAULT_SIGNATURE, convert
from pocketfusion.mobile.flatbuffer import operations, read, weights
from pocketfusion.mobile.quantization.packing import nibbles, pack, round_weights


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.layers = nn.ModuleList([nn.Linear(16, 24), nn.Linear(24, 5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(torch.tanh(self.conv1(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        return self.layers[1](torch.tanh(self.layers[0](y)))


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 8)
        self.unet = _Block()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.unet(x + self.embedding(ids).mean(1)[:, None, None])}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.tflite"
    convert(_Net(), {"x": torch.zeros(1, 6, 6, 8), "ids": torch.zeros(1, 4, dtype=torch.int32)}, path)
    return path


INPUTS = {
    "x": np.random.default_rng(0).standard_normal((1, 6, 6, 8)).astype(np.float32),
    "ids": np.array([[1, 7, 20, 49]], np.int32),
}


def _run(path: Path) -> np.ndarray:
    return gate.run(path, [INPUTS], "y", DEFAULT_SIGNATURE)


def test_a_conversion_keeps_no_weights_in_memory(tmp_path: Path) -> None:
    net = _Net()
    weight = weakref.ref(net.unet.layers[0].weight)
    convert(net, {"x": torch.zeros(1, 6, 6, 8), "ids": torch.zeros(1, 4, dtype=torch.int32)}, tmp_path / "net.tflite")
    del net
    assert weight() is None


def test_layers_are_named_after_their_modules(exact: Path) -> None:
    names = {weight.module: weight.operation for weight in weights(read(exact))}
    assert names == {
        "embedding": "EMBEDDING_LOOKUP",
        "conv1": "CONV_2D",
        "depthwise": "DEPTHWISE_CONV_2D",
        "layers.0": "FULLY_CONNECTED",
        "layers.1": "FULLY_CONNECTED",
    }


def test_round_weights_by_hand() -> None:
    integers, scale = round_weights(np.array([[127.0, -1.6, 0.5], [0, 0, 0], [-2.54, 0.01, 0.0]], np.float32), 8)
    assert integers.tolist() == [[127, -2, 0], [0, 0, 0], [-127, 0, 0]]  # halves go to even
    assert scale == pytest.approx([1.0, 1.0, 0.02])
    integers, scale = round_weights(np.array([[7.0, -3.4]], np.float32), 4)
    assert integers.tolist() == [[7, -3]] and scale == pytest.approx([1.0])


def test_nibbles_by_hand() -> None:
    assert nibbles(np.array([1, -1, 7, -8, 3], np.int8)).tolist() == [0xF1, 0x87, 0x03]


STOCK = {"float16": (16, False), "int8": (8, False), "int8-dynamic": (8, True), "int4-dynamic": (4, True)}


@pytest.mark.parametrize("form", STOCK)
def test_packed_weights_are_the_stock_quantizers(exact: Path, tmp_path: Path, form: str) -> None:
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer

    bits, dynamic = STOCK[form]
    worker = quantizer.Quantizer(str(exact))
    for name in ("CONV_2D", "FULLY_CONNECTED"):
        operation = qtyping.TFLOperationName(name)
        if dynamic:
            worker.add_dynamic_config(".*", operation, bits)
        elif bits == 16:
            casting = algorithm_manager.AlgorithmName.FLOAT_CASTING
            worker.add_weight_only_config(".*", operation, bits, algorithm_key=casting)
        else:
            worker.add_weight_only_config(".*", operation, bits)
    stock = tmp_path / "stock.tflite"
    stock.write_bytes(worker.quantize(enable_progress_bar=False, enable_progress_report=False).quantized_model)
    ours = tmp_path / "ours.tflite"
    kept = ("EMBEDDING_LOOKUP", "DEPTHWISE_CONV_2D")
    pack(exact, ours, lambda weight: "float32" if weight.operation in kept else form)  # type: ignore[arg-type,return-value]

    assert _small_tensors(ours) == _small_tensors(stock)
    assert len(_small_tensors(ours)) == 3
    assert operations(ours) == operations(stock)
    assert np.array_equal(_run(ours), _run(stock))


def _small_tensors(path: Path) -> set[tuple[int, bytes, bytes]]:
    """Type, data and scales of every tensor stored in less than 32 bits."""
    model = read(path)
    small = (schema.TensorType.FLOAT16, schema.TensorType.INT8, schema.TensorType.INT4)
    found = set()
    for tensor in model.subgraphs[0].tensors:
        if tensor.type in small:
            scale = tensor.quantization.scale if tensor.quantization is not None else None
            scales = b"" if scale is None else np.asarray(scale, np.float32).tobytes()
            found.add((tensor.type, np.asarray(model.buffers[tensor.buffer].data).tobytes(), scales))
    return found


def test_depthwise_and_embedding_have_their_own_forms(exact: Path, tmp_path: Path) -> None:
    forms = pack(exact, tmp_path / "int4.tflite", lambda weight: "int4-dynamic")
    assert forms["depthwise"] == forms["embedding"] == "int8-dynamic" and forms["conv1"] == "int4-dynamic"
    sqnr = {}
    for form in ("float16", "int8", "int8-dynamic"):
        pack(exact, tmp_path / "small.tflite", lambda weight, form=form: form)  # type: ignore[misc]
        sqnr[form] = gate.sqnr(_run(exact), _run(tmp_path / "small.tflite"))
    assert sqnr["float16"] > 60 > sqnr["int8"] > 35 and 20 < sqnr["int8-dynamic"] <= sqnr["int8"]


def test_weights_behind_the_flatbuffer_compute_the_same(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside.tflite"
    with monkeypatch.context() as patch:
        patch.setattr(flatbuffer, "MAX_INLINE", 1000)
        pack(exact, outside, lambda weight: "float32")
    plain = schema.ModelT.InitFromPackedBuf(outside.read_bytes(), 0)
    assert any(buffer.offset > 1 for buffer in plain.buffers)
    assert np.array_equal(_run(outside), _run(exact))
    # and it is read back whole: packing it again gives what packing the original gives
    pack(outside, tmp_path / "again.tflite", lambda weight: "int8")
    pack(exact, tmp_path / "direct.tflite", lambda weight: "int8")
    assert (tmp_path / "again.tflite").read_bytes() == (tmp_path / "direct.tflite").read_bytes()


class _Alike(nn.Module):
    """Convolutions of one shape, some without bias, and one merged with a residual's shortcut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1 = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.conv_shortcut = nn.Conv2d(24, 24, 1)
        self.conv_out = nn.Conv2d(24, 24, 3, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.permute(0, 3, 1, 2)
        y = self.conv2(torch.tanh(self.conv1(x))) + self.conv_shortcut(x)
        return {"y": self.conv_out(torch.tanh(y)).permute(0, 2, 3, 1)}


def test_convolutions_get_their_own_weights_back(tmp_path: Path) -> None:
    """They are converted with placeholders, which the converter merges where they are alike."""
    module, path = _Alike().eval(), tmp_path / "alike.tflite"
    convert(module, {"x": torch.zeros(1, 5, 5, 24)}, path)
    found = {weight.module: weight.values for weight in weights(read(path))}
    assert set(found) == {"conv1", "conv2", "conv_shortcut", "conv_out"}
    for name, values in found.items():
        exact = module.get_submodule(name).weight.detach().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(values, exact)
    x = np.random.default_rng(0).standard_normal((1, 5, 5, 24)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x))["y"].numpy()
    assert gate.sqnr(expected, gate.run(path, [{"x": x}], "y", DEFAULT_SIGNATURE)[0]) > 110
    assert module.conv1.weight.std() > 0  # the module keeps its own
