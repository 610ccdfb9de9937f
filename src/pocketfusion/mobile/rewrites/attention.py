"""Attention in at most 4-D, with Q scaled before QK^T and only a slice of the score matrix stored at a time.

Three separate projections and [batch * heads, tokens, width] tensors: no delegate takes the 5-D tensors of fused
projections. Unscaled scores overflow fp16, so Q is scaled first. The scores of all heads of SD-1.5's 64x64 attention
are 268 MB in fp16: they are computed for as many queries at a time as the limits allow.

CLIP's causal mask is an additive constant that fp16 can hold. The library's own mask is a choice between the scores
and minus infinity, made anew in the graph. Where a delegate turns that into 0 * infinity, or float32's lowest number
into fp16, the answer is NaN. -10,000 added to a score is as final: exp(-10,000) is zero in every float.

For Apple's Neural Engine one head at a time on [B, C, 1, N]. Apple's notes on transformers for it
(machinelearning.apple.com, 2022, "Deploying Transformers on the Apple Neural Engine") ask for channels first,
projections as 1x1 convolutions, and heads in products of their own, so that no tensor is reshaped into heads. The same
numbers as the plain form; not measured on that hardware here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoder

from pocketfusion.mobile.devices import Limits
from pocketfusion.mobile.rewrites.passes import Rewrite, replace


def query_rows(heads: int, queries: int, keys: int, limits: Limits) -> int:
    """How many queries' scores may be stored at a time: the most, in equal slices, that `limits` allow."""
    rows = queries
    if limits.attention_score_bytes is not None:
        rows = min(rows, limits.attention_score_bytes // (heads * keys * limits.bytes_per_value))
    if limits.image2d is not None:
        rows = min(rows, limits.image2d)
    return math.ceil(queries / math.ceil(queries / max(1, rows)))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: int,
    scale: float,
    mask: torch.Tensor | None,
    limits: Limits,
) -> torch.Tensor:
    """Multi-head attention of [B, N, heads * d] on [B, M, heads * d] → [B, N, heads * d].

    `mask` is additive, [1 or B, 1, 1 or N, M].
    """
    batch, queries, width = query.shape
    keys, size = key.shape[1], width // heads
    if keys == 1:  # its softmax is 1, which the converter makes x / x of, and the delegate refuses that
        return torch.cat([value] * queries, dim=1)
    q = (query * scale).reshape(batch, queries, heads, size).permute(0, 2, 1, 3).reshape(-1, queries, size)
    k = key.reshape(batch, keys, heads, size).permute(0, 2, 3, 1).reshape(-1, size, keys)
    v = value.reshape(batch, keys, heads, size).permute(0, 2, 1, 3).reshape(-1, keys, size)
    if mask is not None:
        # of one row: for all heads; else repeated for each, by concatenation, as delegates refuse BROADCAST_TO
        mask = mask[0] if mask.shape[0] == 1 else torch.cat([mask] * heads, 1).reshape(-1, *mask.shape[2:])
    rows = query_rows(batch * heads, queries, keys, limits)
    slices = []
    for start in range(0, queries, rows):
        scores = q[:, start : start + rows] @ k
        if mask is not None:
            scores = scores + (mask if mask.shape[1] == 1 else mask[:, start : start + rows])
        y = (torch.softmax(scores, dim=-1) @ v).reshape(batch, heads, -1, size)
        # in its final layout: products that share `v` and are joined at once, the converter would make one again
        slices.append(y.permute(0, 2, 1, 3).reshape(batch, -1, width))
    return slices[0] if len(slices) == 1 else torch.cat(slices, dim=1)


class AttentionParts(nn.Module):
    """diffusers' `Attention` as SD's UNet (tokens [B, N, C]) and autoencoder (pictures [B, C, H, W]) have it."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.group_norm = attention.group_norm
        self.to_q, self.to_k, self.to_v, self.to_out = (
            attention.to_q,
            attention.to_k,
            attention.to_v,
            attention.to_out,
        )
        self.heads, self.residual = attention.heads, attention.residual_connection
        self.rescale = attention.rescale_output_factor


class UNetAttention(AttentionParts):
    """Its scores a slice of queries at a time, as `limits` ask."""

    def __init__(self, attention: Attention, limits: Limits):
        super().__init__(attention)
        self.limits = limits

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        x = hidden_states
        shape = x.shape
        if x.ndim == 4:
            x = x.permute(0, 2, 3, 1).reshape(shape[0], -1, shape[1])
        if self.group_norm is not None:
            x = self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        states = x if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.to_q(x), self.to_k(states), self.to_v(states)
        mask = None if attention_mask is None else attention_mask[:, None]
        y = attend(q, k, v, self.heads, (q.shape[-1] // self.heads) ** -0.5, mask, self.limits)
        y = self.to_out[0](y)
        if len(shape) == 4:
            y = y.reshape(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        if self.residual:
            y = y + hidden_states
        return y if self.rescale == 1 else y / self.rescale


class TextAttention(nn.Module):
    """CLIP's attention, and BERT's without its output layer: tokens [B, T, C] → (tokens, None)."""

    def __init__(self, attention: Any, limits: Limits):
        super().__init__()
        config = attention.config
        clip = isinstance(attention, CLIPAttention)
        names = ("q_proj", "k_proj", "v_proj", "out_proj") if clip else ("query", "key", "value")
        for name in names:
            setattr(self, name, getattr(attention, name))
        self.names, self.heads, self.limits = names, config.num_attention_heads, limits
        self.causal = causal_mask(config.max_position_embeddings) if clip else None

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **ignored: Any
    ) -> tuple[torch.Tensor, None]:
        q, k, v = (getattr(self, name)(hidden_states) for name in self.names[:3])
        tokens, width = hidden_states.shape[1:]
        if attention_mask is None and self.causal is not None:
            attention_mask = self.causal[:, :, :tokens, :tokens]
        y = attend(q, k, v, self.heads, (width // self.heads) ** -0.5, attention_mask, self.limits)
        return (getattr(self, self.names[3])(y) if len(self.names) == 4 else y), None


def plain(attention: Attention) -> bool:
    """If the module has nothing but what SD's have."""
    extras = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return attention.to_k is not None and all(getattr(attention, name) is None for name in extras)


def _parts(module: nn.Module, limits: Limits) -> int:
    def make(child: nn.Module) -> nn.Module | None:
        if isinstance(child, Attention) and plain(child):
            return UNetAttention(child, limits)
        if isinstance(child, (CLIPAttention, BertSelfAttention)):
            return TextAttention(child, limits)
        return None

    return replace(module, make)


ATTENTION = Rewrite(
    name="attention",
    reason="memory",
    summary="at most 4-D, Q scaled before QK^T, scores stored for a slice of the queries at a time",
    source="this project (docs/mobile.md)",
    apply=_parts,
)


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


def _masks(module: nn.Module, limits: Limits) -> int:
    return replace(module, lambda child: MaskedEncoder(child) if isinstance(child, CLIPEncoder) else None)


MASKS = Rewrite(
    name="masks",
    reason="fp16 range",
    summary="CLIP's causal mask as an additive constant of -10,000",
    source="LiteRT issue 8593",
    apply=_masks,
)


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


def _split(module: nn.Module, limits: Limits) -> int:
    return replace(
        module, lambda child: SplitAttention(child) if isinstance(child, Attention) and plain(child) else None
    )


SPLIT_ATTENTION = Rewrite(
    name="split-attention",
    reason="speed",
    summary="channels first, projections as 1x1 convolutions, a product for each head",
    source="Apple, Deploying Transformers on the Apple Neural Engine (2022); not measured on it",
    apply=_split,
)
