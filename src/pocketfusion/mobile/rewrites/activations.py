"""GELU without an operation that devices lack or overflow in, and SiLU in the order of its neighbours.

GELU is tanh of a clamped polynomial. *Squeezing* clips the argument of the usual cubic (x + 0.044715 x^3, whose cube
leaves fp16 at 40). That cubic is itself off by 5e-4 from the erf form that Stable Diffusion's weights were trained
with. Here the odd polynomial has degree 9, fitted to artanh(2 Phi(x) - 1), and the result is within 4e-6 of erf's
everywhere. It is evaluated in (x / 4)^2, where all coefficients are normal fp16 numbers.

SiLU between a norm and a convolution in NHWC is in it too.
"""

from __future__ import annotations

import torch
from diffusers.models.activations import GEGLU
from torch import nn
from transformers.activations import GELUActivation, QuickGELUActivation

from pocketfusion.mobile.devices import Limits
from pocketfusion.mobile.rewrites.passes import Rewrite, replace

#: artanh(2 Phi(x) - 1) = x * sum(c_i * (x / 4)^(2 i)) for |x| <= 6: least-squares, reweighted towards equal errors.
_COEFFICIENTS = (0.7978281361, 0.58350064546, -0.03196442494, -0.12526006028, 0.07334056521)
#: Beyond this, GELU is 0 or x in fp32 too. (The paper clips at 10.)
_CLAMP = 6.0
#: The sigmoid of 20 is 1 to fp32's last bit but one.
_SIGMOID_CLAMP = 20.0


class ClampedGELU(nn.Module):
    """GELU (erf form), any shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = x.clamp(-_CLAMP, _CLAMP)
        quarter = inside * 0.25
        square = quarter * quarter
        sum_ = square * _COEFFICIENTS[-1] + _COEFFICIENTS[-2]
        for coefficient in reversed(_COEFFICIENTS[:-2]):
            sum_ = sum_ * square + coefficient
        return (x * 0.5) * (1.0 + torch.tanh(inside * sum_))


class ClampedQuickGELU(nn.Module):
    """CLIP's x * sigmoid(1.702 x), any shape."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid((1.702 * x).clamp(-_SIGMOID_CLAMP, _SIGMOID_CLAMP))


class ClampedGEGLU(nn.Module):
    """diffusers' `GEGLU`, [B, N, C] → [B, N, C']."""

    def __init__(self, geglu: GEGLU):
        super().__init__()
        self.proj, self.gelu = geglu.proj, ClampedGELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * self.gelu(gate)


def _apply(module: nn.Module, limits: Limits) -> int:
    def make(child: nn.Module) -> nn.Module | None:
        if isinstance(child, GEGLU):
            return ClampedGEGLU(child)
        if isinstance(child, QuickGELUActivation):
            return ClampedQuickGELU()
        exact = isinstance(child, GELUActivation) or (isinstance(child, nn.GELU) and child.approximate == "none")
        return ClampedGELU() if exact else None

    return replace(module, make)


GELU = Rewrite(
    name="gelu",
    reason="fp16 range",
    summary="tanh of a clamped polynomial, within 4e-6 of the erf form; CLIP's quick GELU with a clamped sigmoid",
    source="Squeezing Large-Scale Diffusion Models for Mobile (arXiv 2307.01193); the polynomial is this project's",
    apply=_apply,
)


class SiLUNHWC(nn.Module):
    """SiLU applied in NHWC order, so that the transposes of its neighbours (norm before, convolution after) cancel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 4:
            return torch.nn.functional.silu(x)
        return torch.nn.functional.silu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _nhwc(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: SiLUNHWC() if isinstance(child, nn.SiLU) else None)


SILU_NHWC = Rewrite(
    name="silu-nhwc",
    reason="speed",
    summary="SiLU in NHWC order, so that its neighbours' transposes cancel",
    source="this project (docs/export.md)",
    apply=_nhwc,
)
