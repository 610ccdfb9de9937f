"""The executor's operations against torch: small networks through the real converter, saved, loaded, run.

Each network is what brings an operation into a Stable Diffusion program; at the end every operation that the executor
has must have been run by one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pocketfusion.mobile.coreml.executor import Executor
from pocketfusion.mobile.coreml.mil_operations import OPERATIONS
from pocketfusion.mobile.devices import TARGETS

TARGET = TARGETS["coreml"]
RUN: set[str] = set()
SAMPLES = {
    "x": torch.linspace(-3, 3, 2 * 4 * 6 * 8).reshape(2, 4, 6, 8).flip(1) + 0.01 * torch.arange(8.0),
    "ids": torch.tensor([[3, 0, 6, 1]], dtype=torch.int32),
    "mask": torch.tensor([[1, 1, 1, 0]], dtype=torch.int32),
}


class Everything(nn.Module):
    """One output an operation, or a few."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.plain = nn.Conv2d(4, 4, (1, 3), padding=(0, 1), dilation=1, bias=False)
        self.batch = nn.BatchNorm2d(4).eval()
        self.batch.running_mean, self.batch.running_var = torch.randn(4), torch.rand(4) + 0.5
        self.group, self.layer = nn.GroupNorm(2, 4), nn.LayerNorm(8)
        self.linear, self.table = nn.Linear(8, 5), nn.Embedding(7, 8)
        for parameter in (*self.group.parameters(), *self.layer.parameters()):
            nn.init.normal_(parameter)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.table(ids)  # [1, 4, 8]
        keep = (1.0 - mask[:, None, None, :].float()).expand(-1, 1, 4, -1)
        first, second = x.chunk(2, dim=1)
        return {
            "conv": self.conv(x),
            "plain": self.plain(x),
            "batch": self.batch(x),
            "group": self.group(x),
            "layer": self.layer(x),
            "linear": self.linear(x),
            "tokens": tokens * 2.0,
            "masked": tokens @ tokens.mT + keep * -1e4,
            "two": torch.cat([first * second, first / (2 + second.abs()), first - second], dim=1),
            "sizes": torch.cat(x.split([1, 3], dim=1)[::-1], dim=1),
            "between": torch.minimum(torch.maximum(x, 0.3 * x + 0.5), x.square().clamp(0.25, 6.0)),
            "waves": torch.sin(x) + torch.cos(x) + torch.tanh(x) * torch.exp(-x.abs()),
            "bends": F.silu(x) + F.gelu(x) + torch.sigmoid(x) + F.relu(x),
            "roots": torch.rsqrt(x.square() + 0.5) + torch.sqrt(x.abs() + 1) + x.abs() ** 1.5,
            "sums": x.sum(3) + x.mean(3) + x.amax(3),
            "softmax": x.softmax(2),
            "part": x[:, 1:3, ::2, -5:] + 1.0,
            "one": x[:, 2] * 1.0,
            "nearest": F.interpolate(x, scale_factor=2.0, mode="nearest"),
            "padded": F.pad(x, (1, 0, 2, 1), value=0.5),
            "turned": x.permute(0, 3, 1, 2).reshape(2, 8, -1)[:, :, None].squeeze(2) * 3.0,
            "stacked": torch.stack([x, -x], dim=2),
            "attended": F.scaled_dot_product_attention(x, 0.5 * x, x + 1),
            "biased": F.scaled_dot_product_attention(tokens[:, None], tokens[:, None], tokens[:, None], keep * -1e4),
        }


@pytest.mark.parametrize("ios", [17, 18])
def test_operations_equal_torchs(ios: int, convert: Callable, tmp_path: Path) -> None:
    module = Everything().eval()
    with torch.no_grad():
        expected = module(**SAMPLES)
    convert(module, SAMPLES, tmp_path / "all.mlpackage", ios=ios, half=False)
    executor = Executor(tmp_path / "all.mlpackage")
    RUN.update(executor.operations)
    found = executor(**{name: values.numpy() for name, values in SAMPLES.items()})
    assert set(found) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values.numpy(), rtol=2e-4, atol=2e-5, err_msg=name)
    assert ("scaled_dot_product_attention" in executor.operations) == (ios == 18)


def test_every_operation_has_been_compared(convert: Callable) -> None:
    """What no network brings is not in the table, constants' forms apart (test_weight_forms.py)."""
    assert RUN, "runs after test_operations_equal_torchs"
    assert {name for name in OPERATIONS if not name.startswith("constexpr_")} - RUN == set()


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("cast", {"x": torch.tensor([-1.7, 2.9]), "dtype": "int32"}, torch.tensor([-1, 2], dtype=torch.int32)),
        ("reshape", {"x": torch.zeros(2, 6), "shape": torch.tensor([0, 2, -1])}, torch.zeros(2, 2, 3)),
        (
            "scaled_dot_product_attention",  # a mask of booleans keeps what is true: here the first key alone
            {
                **{name: torch.ones(1, 1, 2) for name in ("query", "key")},
                "value": torch.tensor([[[5.0, 7.0]]]),
                "attn_mask": torch.tensor([[True]]),
            },
            torch.tensor([[[5.0, 7.0]]]),
        ),
        (  # coremltools 9.0 drops `approximate` on this path, so that no network brings it
            "gelu",
            {"x": torch.tensor([1.0]), "mode": "TANH_APPROXIMATION"},
            torch.tensor([0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))]),
        ),
        ("rsqrt", {"x": torch.tensor([3.0]), "epsilon": torch.tensor(1.0)}, torch.tensor([0.5])),
        ("gather", {"x": torch.arange(4.0), "indices": torch.tensor([2]), "axis": -1}, torch.tensor([2.0])),
    ],
)
def test_by_hand(name: str, arguments: dict, expected: torch.Tensor) -> None:
    torch.testing.assert_close(OPERATIONS[name](**arguments), expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("conv", {"x": torch.zeros(1, 1, 4), "weight": torch.zeros(1, 1, 1)}),
        ("pad", {"x": torch.zeros(2), "pad": torch.tensor([1, 1]), "mode": "reflect"}),
        ("layer_norm", {"x": torch.zeros(2, 3), "axes": torch.tensor([0])}),
        ("gelu", {"x": torch.zeros(2), "mode": "SIGMOID_APPROXIMATION"}),
        ("concat", {"values": [torch.zeros(2)], "axis": torch.tensor(0), "interleave": torch.tensor(True)}),
        ("upsample_nearest_neighbor", {"x": torch.zeros(1, 1, 2, 2), "scale_factor_height": 1.5}),
        ("slice_by_index", {"x": torch.zeros(4), **dict.fromkeys(("begin", "end", "stride"), torch.tensor([-1]))}),
        ("cast", {"x": torch.zeros(2), "dtype": "int64"}),
    ],
)
def test_forms_that_are_not_known_are_errors(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError):
        OPERATIONS[name](**arguments)


def test_rounding_is_halfs(convert: Callable, tmp_path: Path) -> None:
    """Each result in half precision: 2049 has no place there, and what is over 65504 is infinite."""

    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": torch.relu((x * 1.5 + 1.0) * 1.25)}

    samples = {"x": torch.tensor([1.0, 1365.3334, 60000.0])}
    convert(Sum(), samples, tmp_path / "sum.mlpackage")
    (exact,) = Executor(tmp_path / "sum.mlpackage")(x=samples["x"].numpy()).values()
    (rounded,) = Executor(tmp_path / "sum.mlpackage", "rounded")(x=samples["x"].numpy()).values()
    half = samples["x"].half()
    assert math.isfinite(exact[2]) and exact[2] == pytest.approx(112501.25)
    assert rounded.tolist() == ((half * 1.5 + 1.0) * 1.25).float().tolist() and math.isinf(rounded[2])
