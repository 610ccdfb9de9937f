"""Attention of one head at a time on [B, C, 1, N], the form that Apple's Neural Engine is said to compute best.

Apple's notes on transformers for it (machinelearning.apple.com, 2022, "Deploying Transformers on the Apple Neural
Engine") ask for channels first, projections as 1x1 convolutions, and heads in products of their own, so that no tensor
is reshaped into heads. The same numbers as the plain form; not measured on that hardware here.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F

from pocketfusion.mobile.rewrites.attention import AttentionParts, plain
from pocketfusion.mobile.rewrites.base import Rewrite, replace
from pocketfusion.mobile.targets import Limits


class SplitAttention(AttentionParts):
    """diffusers' `Attention`, computed head by head."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, **ignored: Any
    ) -> torch.Tensor:
        picture = hidden_states.ndim == 4
        x = hidden_states.flatten(2)[:, :, None] if picture else hidden_states.transpose(1, 2)[:, :, None]
        if self.group_norm is not None:
            x = self.group_norm(x.squeeze(2))[:, :, None]
        states = x if encoder_hidden_states is None else encoder_hidden_states.transpose(1, 2)[:, :, None]
        size = self.to_q.out_features // self.heads
        q, v = _project(self.to_q, x) * size**-0.5, _project(self.to_v, states)
        k = _project(self.to_k, states).permute(0, 3, 2, 1)  # [B, M, 1, C]
        parts = []
        for rows in (slice(i, i + size) for i in range(0, size * self.heads, size)):
            scores = k[..., rows].transpose(1, 2) @ q[:, rows].transpose(1, 2)  # [B, 1, M, N]
            parts.append((v[:, rows].transpose(1, 2) @ scores.softmax(2)).transpose(1, 2))
        y = _project(self.to_out[0], torch.cat(parts, dim=1))
        y = y.reshape(hidden_states.shape) if picture else y.squeeze(2).transpose(1, 2)
        if self.residual:
            y = y + hidden_states
        return y if self.rescale == 1 else y / self.rescale


def _project(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """[B, C, 1, N] -> [B, C', 1, N]"""
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def _apply(module: nn.Module, limits: Limits) -> int:
    return replace(
        module, lambda child: SplitAttention(child) if isinstance(child, Attention) and plain(child) else None
    )


SPLIT_ATTENTION = Rewrite(
    name="split-attention",
    reason="speed",
    summary="channels first, projections as 1x1 convolutions, a product for each head",
    source="Apple, Deploying Transformers on the Apple Neural Engine (2022); not measured on it",
    apply=_apply,
)
