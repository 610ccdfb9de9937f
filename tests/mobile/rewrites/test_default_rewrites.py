"""The rewrites are exact: the same numbers as torch's own modules, and none of the operations that GPUs refuse."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.convert import DEFAULT_SIGNATURE, convert
from pocketfusion.mobile.delegate.graph import load
from pocketfusion.mobile.devices import Limits, Target
from pocketfusion.mobile.flatbuffer import operations
from pocketfusion.mobile.gate import run
from pocketfusion.mobile.rewrites import rewrite
from pocketfusion.mobile.rewrites.activations import SiLUNHWC
from pocketfusion.mobile.rewrites.norms import GroupNormNHWC


@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (2, 12, 9)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_equals_torch(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(3, 12, eps=1e-5, affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = torch.randn(shape) * 30 + 10
    torch.testing.assert_close(GroupNormNHWC(norm)(x), norm(x), rtol=1e-5, atol=1e-5)


def test_silu_equals_torch() -> None:
    for shape in ((2, 8, 3, 3), (2, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(SiLUNHWC()(x), nn.functional.silu(x))


def test_rewrite_copies() -> None:
    original = nn.Sequential(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), nn.Conv2d(4, 4, 1))
    changed, counts = rewrite(original)
    assert counts == {"group-norm": 1, "silu-nhwc": 1}
    assert isinstance(original[0][0], nn.GroupNorm) and isinstance(original[0][1], nn.SiLU)
    assert isinstance(changed[0][0], GroupNormNHWC) and isinstance(changed[0][1], SiLUNHWC)
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(changed(x), original(x))


def test_rewrite_shares_parameters_also_on_meta() -> None:
    with torch.device("meta"):
        original = nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1))
    changed, _ = rewrite(original)
    assert {id(p) for p in changed.parameters()} == {id(p) for p in original.parameters()}
    assert all(p.is_meta for p in changed.parameters())


def test_a_module_that_is_itself_rewritten() -> None:
    assert isinstance(rewrite(nn.GroupNorm(2, 4))[0], GroupNormNHWC)


def test_unknown_pass() -> None:
    with pytest.raises(PocketfusionError, match="no rewrite 'group-nrom': choose among .*group-norm"):
        rewrite(nn.SiLU(), names=["group-nrom"])


class _Block(nn.Module):
    """`layers`, NHWC outside."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.layers(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


def test_residual_branch_is_nhwc_inside(tmp_path: Path) -> None:
    """And what has the picture's size is never reshaped, nor are a norm's fresh weights broadcast."""
    branch = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
    convert(_Block(branch), {"x": torch.randn(1, 6, 6, 8)}, tmp_path / "block.tflite")
    (counts,) = operations(tmp_path / "block.tflite")
    assert counts["CONV_2D"] == 1
    assert counts["TRANSPOSE"] == 0 and counts["BROADCAST_TO"] == 0
    (graph,) = load(tmp_path / "block.tflite").graphs
    reshaped = [math.prod(op.outputs[0].shape) for op in graph.operations if op.kind == "RESHAPE"]
    assert reshaped and max(reshaped) <= 8


class _Mid(nn.Module):
    """The autoencoder's attention, of a single head, NHWC outside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(16, heads=1, dim_head=16, bias=True, norm_num_groups=4, residual_connection=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.attention(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


def test_products_of_activations_are_no_layers(tmp_path: Path) -> None:
    """XNNPACK leaves a FULLY_CONNECTED whose weight is computed to a slow kernel; the converter writes QK^T so."""
    module, x = _Mid().eval(), torch.randn(1, 6, 5, 16)
    convert(module, {"x": x}, tmp_path / "mid.tflite")
    (counts,) = operations(tmp_path / "mid.tflite")
    assert (counts["FULLY_CONNECTED"], counts["BATCH_MATMUL"]) == (4, 2)
    measured = run(tmp_path / "mid.tflite", [{"x": x.numpy()}], "y", DEFAULT_SIGNATURE)[0]
    torch.testing.assert_close(torch.from_numpy(measured), module(x)["y"], rtol=1e-4, atol=1e-5)


def test_slices_of_a_weight_convert(tmp_path: Path) -> None:
    """litert-torch frees its copies of weights that are not contiguous before it has read them, now and then."""
    conv = nn.Conv2d(32, 8, 3, padding=1)
    conv.weight = nn.Parameter(conv.weight.to(memory_format=torch.channels_last))
    before = conv.weight.stride()
    x = torch.randn(1, 6, 6, 32)
    target = Target(name="litert-gpu", rewrites=("serialise-conv",), limits=Limits(weight_bytes=conv.weight.numel()))
    for _ in range(3):
        assert convert(_Block(conv), {"x": x}, tmp_path / "conv.tflite", target) == {"serialise-conv": 1}
        measured = run(tmp_path / "conv.tflite", [{"x": x.numpy()}], "y", DEFAULT_SIGNATURE)[0]
        torch.testing.assert_close(torch.from_numpy(measured), _Block(conv)(x)["y"])
    assert conv.weight.stride() == before


class _Tokens(nn.Module):
    """An attention on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(16, heads=2, dim_head=8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.attention(x)}


def test_slices_of_scores_stay_apart_in_the_file(tmp_path: Path) -> None:
    """The converter joins products that share a factor: that would store all scores at once again."""
    limits = Limits(float16=True, attention_score_bytes=2 * 32 * 64 * 2)
    target = Target(name="litert-gpu", rewrites=("attention",), limits=limits)
    convert(_Tokens(), {"x": torch.randn(1, 64, 16)}, tmp_path / "attention.tflite", target)
    (graph,) = load(tmp_path / "attention.tflite").graphs
    sizes = [tensor.shape for operation in graph.operations for tensor in operation.outputs]
    assert (2, 32, 64) in sizes and max(math.prod(size) for size in sizes) == 2 * 32 * 64
