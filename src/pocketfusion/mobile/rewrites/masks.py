"""CLIP's causal mask as an additive constant that fp16 can hold.

The library's own mask is a choice between the scores and minus infinity, made anew in the graph. Where a delegate
turns that into 0 * infinity, or float32's lowest number into fp16, the answer is NaN. -10,000 added to a score is as
final: exp(-10,000) is zero in every float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoder

from pocketfusion.mobile.rewrites.base import Rewrite, replace
from pocketfusion.mobile.targets import Limits

#: What is added to a score that must not count.
MASKED = -1e4


def causal_mask(tokens: int) -> nn.Buffer:
    """[1, 1, tokens, tokens]: 0 up to and at each token's own place, `MASKED` after it."""
    return nn.Buffer(torch.full((1, 1, tokens, tokens), MASKED, device="cpu").triu(1), persistent=False)


class MaskedEncoder(nn.Module):
    """`CLIPEncoder` whose layers get the causal mask as a constant, or where its config has `use_attention_mask` the
    whole mask that `wrappers.TextEncoder` passes."""

    def __init__(self, encoder: CLIPEncoder):
        super().__init__()
        self.layers = encoder.layers
        self.causal = causal_mask(encoder.config.max_position_embeddings)
        self.given = bool(getattr(encoder.config, "use_attention_mask", False))

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None = None, **ignored: Any) -> Any:
        x, tokens = inputs_embeds, inputs_embeds.shape[1]
        mask = attention_mask if self.given else self.causal[:, :, :tokens, :tokens]
        for layer in self.layers:
            x = layer(x, mask)
        return BaseModelOutput(last_hidden_state=x)


def _apply(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: MaskedEncoder(child) if isinstance(child, CLIPEncoder) else None)


MASKS = Rewrite(
    name="masks",
    reason="fp16 range",
    summary="CLIP's causal mask as an additive constant of -10,000",
    source="LiteRT issue 8593",
    apply=_apply,
)
