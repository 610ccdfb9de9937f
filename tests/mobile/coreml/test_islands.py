"""What computes in fp32 in a program of fp16, and that it has to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pocketfusion.mobile.coreml import mlpackage
from pocketfusion.mobile.coreml.executor import Executor
from pocketfusion.mobile.gate import sqnr

WIDE = {"x": 400 * torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.norm(x)}


def kinds(package: Path) -> dict[str, set[int]]:
    """The types of each operation's results: 10 is FLOAT16, 11 FLOAT32."""
    found: dict[str, set[int]] = {}
    for one in mlpackage.read_program(package)[1].operations:
        found.setdefault(one.type, set()).add(one.outputs[0].type.tensorType.dataType)
    return found


def test_group_norms_of_wide_activations(convert: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deviations over 255 have no square in fp16: without the island the norm is lost, with it nothing is."""
    from pocketfusion.mobile.coreml import program

    convert(Norm(), WIDE, tmp_path / "island.mlpackage")
    monkeypatch.setattr(program, "in_half", lambda: lambda operation: True)
    convert(Norm(), WIDE, tmp_path / "half.mlpackage")
    with torch.no_grad():
        expected = Norm()(**WIDE)["y"].numpy()
    found = {}
    for name in ("island", "half"):
        (found[name],) = Executor(tmp_path / f"{name}.mlpackage", "rounded")(x=WIDE["x"].numpy()).values()
    assert kinds(tmp_path / "island.mlpackage")["square"] == {11} and kinds(tmp_path / "half.mlpackage")["square"] == {
        10
    }
    assert sqnr(expected, found["island"]) > 55 and not sqnr(expected, found["half"]) > 10


def test_a_unets_sines_are_in_fp32(coreml_bundle: Path) -> None:
    found = kinds(coreml_bundle / "unet.mlpackage")
    assert found["sin"] == found["cos"] == found["square"] == {11}
    assert found["conv"] == found["linear"] == {10}


def test_a_step_in_the_graph_keeps_the_latents(convert: Callable, tmp_path: Path) -> None:
    """Latents that fp16 would round come out of a step by nothing as they went in."""

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, sample: torch.Tensor, c: torch.Tensor) -> dict[str, torch.Tensor]:
            scale, a, b = c.reshape(1, 1, 1, 3).split(1, dim=3)
            uncond, cond = self.conv(torch.cat([sample, -sample])).split(1)
            return {"prev_sample": a * sample + b * (uncond + scale * (cond - uncond))}

    samples = {"sample": torch.full((1, 2, 2, 2), 1.0001), "c": torch.tensor([[4.0, 1.0, 0.0]])}
    convert(Step(), samples, tmp_path / "step.mlpackage")
    given = {name: values.numpy() for name, values in samples.items()}
    (found,) = Executor(tmp_path / "step.mlpackage", "rounded")(**given).values()
    np.testing.assert_array_equal(found, given["sample"])
