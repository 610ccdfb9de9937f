"""SiLU in NHWC order, between a norm and a convolution that are in it too."""

from __future__ import annotations

import torch
from torch import nn

from pocketfusion.mobile.rewrites.base import Rewrite, replace
from pocketfusion.mobile.targets import Limits


class SiLUNHWC(nn.Module):
    """SiLU applied in NHWC order, so that the transposes of its neighbours (norm before, convolution after) cancel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4:
            return torch.nn.functional.silu(x)
        return torch.nn.functional.silu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def apply(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: SiLUNHWC() if isinstance(child, nn.SiLU) else None)


SILU_NHWC = Rewrite(
    name="silu-nhwc",
    reason="speed",
    summary="SiLU in NHWC order, so that its neighbours' transposes cancel",
    source="this project (docs/export.md)",
    apply=apply,
)
