"""What Core ML cannot express is told by its module; a name more for a tensor is no operation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.coreml.executor import Executor


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Net(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ReLU(), inner])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.blocks[1](self.blocks[0](x))}


class Renamed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.alias(torch.exp(x)) * 2.0


SAMPLES = {"x": torch.tensor([0.5, -1.0])}


def test_an_operation_that_core_ml_lacks(convert: Callable, tmp_path: Path) -> None:
    message = r"the operation special_bessel_j0 of blocks\.1 in Net: .* as a rewrite .* or export with --target litert"
    with pytest.raises(PocketfusionError, match=message):
        convert(Net(Odd()), SAMPLES, tmp_path / "odd.mlpackage")
    assert not list(tmp_path.iterdir())


def test_a_name_more_for_a_tensor(convert: Callable, tmp_path: Path) -> None:
    convert(Net(Renamed()), SAMPLES, tmp_path / "renamed.mlpackage")
    (found,) = Executor(tmp_path / "renamed.mlpackage")(x=SAMPLES["x"].numpy()).values()
    assert found.tolist() == pytest.approx([2 * 2.718281828**0.5, 2.0], rel=1e-5)
