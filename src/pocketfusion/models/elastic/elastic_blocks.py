"""The stages of the elastic UNet, made of stock diffusers blocks under their stock names."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from pocketfusion.models.elastic.architecture import Block, BlockName, Layer, Stage
from pocketfusion.models.elastic.skips import Shape
from pocketfusion.models.elastic.units import narrow


class Shortcut(nn.Module):
    """What is left of a removed ResNet that changes channels: its 1x1 convolution."""

    def __init__(self, conv_shortcut: nn.Module):
        super().__init__()
        self.conv_shortcut = conv_shortcut

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """[B, C_in, H, W] → [B, C_out, H, W]; the time embedding is not used."""
        return self.conv_shortcut(x.contiguous())


class CrossAttentionOnly(nn.Module):
    """Stock's BasicTransformerBlock without self-attention: text cross-attention and feed-forward stay."""

    def __init__(self, block: BasicTransformerBlock):
        super().__init__()
        self.norm2, self.attn2, self.norm3, self.ff = block.norm2, block.attn2, block.norm3, block.ff

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens [B, N, C] and text states [B, T, D] → tokens; the signature is stock's."""
        hidden_states = hidden_states + self.attn2(
            self.norm2(hidden_states),
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            **(cross_attention_kwargs or {}),
        )
        return hidden_states + self.ff(self.norm3(hidden_states))


def attention_block(stock: Any, block: Block) -> nn.Module:
    """`stock` (a Transformer2DModel) or, for a copy, its like, without what `block` lacks; sizes only, no weights."""
    changed = block.number or not block.self_attention or block.feed_forward < 1 or block.pruned
    module: Any = copy.deepcopy(stock) if changed else stock
    for i, inner in enumerate(module.transformer_blocks):
        if block.feed_forward < 1:
            gate, out = inner.ff.net[0].proj, inner.ff.net[2]
            width = feed_forward_width(out.in_features, block.feed_forward)
            like = {"device": out.weight.device, "dtype": out.weight.dtype}
            inner.ff.net[0].proj = nn.Linear(gate.in_features, 2 * width, **like)
            inner.ff.net[2] = nn.Linear(width, out.out_features, **like)
        if not block.self_attention:
            module.transformer_blocks[i] = CrossAttentionOnly(inner)
    narrow(module, block)
    return module


def feed_forward_width(stock: int, share: float) -> int:
    """Inner channels that remain, a multiple of 8 (what vector units like) and at least 8."""
    return max(8, round(stock * share / 8) * 8)


def resnet_block(stock: ResnetBlock2D, block: Block, shape: Shape) -> nn.Module:
    """`stock`, or for a copy a block that takes the layer's output (and in an up layer its skip again)."""
    module = stock
    if block.number and shape.hidden != shape.out:
        with torch.device(stock.conv1.weight.device):
            module = ResnetBlock2D(
                in_channels=shape.out + shape.skip,
                out_channels=shape.out,
                temb_channels=stock.time_emb_proj.in_features,
                groups=stock.norm1.num_groups,
                eps=stock.norm1.eps,
                dropout=stock.dropout.p,
            )
    elif block.number or block.pruned:
        module = copy.deepcopy(stock)
    narrow(module, block)
    return module


class ElasticStage(nn.Module):
    """A down, mid or up stage: its layers' blocks by name, and what a removed block leaves."""

    def __init__(self, name: str, stage: Stage, stock: Any, shapes: dict[tuple[str, int], Shape]):
        super().__init__()
        self.name, self.stage = name, stage
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None  # diffusers sets both
        self.resnets, self.attentions = nn.ModuleDict(), nn.ModuleDict()
        for layer in stage.layers:
            at, shape = layer.index, shapes[name, layer.index]
            for block in layer.resnets:
                key = BlockName(name, "resnets", at, block.number).key
                self.resnets[key] = resnet_block(stock.resnets[at], block, shape)
            if not any(block.number == 0 for block in layer.resnets) and stock.resnets[at].conv_shortcut is not None:
                self.resnets[f"{at}"] = Shortcut(stock.resnets[at].conv_shortcut)
            for block in layer.attentions:
                key = BlockName(name, "attentions", at, block.number).key
                self.attentions[key] = attention_block(stock.attentions[at], block)
        self.downsamplers: Any = None
        self.upsamplers: Any = None
        if stage.sampler:
            self.downsamplers = getattr(stock, "downsamplers", None)
            self.upsamplers = getattr(stock, "upsamplers", None)

    def forward(
        self,
        x: torch.Tensor,
        temb: torch.Tensor,
        skips: list[torch.Tensor],
        skipped: Collection[str] = (),
        upsample_size: Any = None,
        **attention: Any,
    ) -> torch.Tensor:
        """[B, C, H, W] → the stage's output. A down stage appends to `skips`, an up stage takes from its end.

        `skipped`: names of blocks that this call replaces by the identity (a ResNet keeps its shortcut).
        `attention`: what the cross-attention blocks take besides: text states, masks, kwargs.
        """
        down, up = self.name.startswith("down"), self.name.startswith("up")
        for layer in self.stage.layers:
            skip = skips.pop() if up else None
            x = self._resnets(layer, x, temb, skip, skipped)
            for block in layer.attentions:
                name = BlockName(self.name, "attentions", layer.index, block.number)
                if str(name) not in skipped:
                    x = self._call(self.attentions[name.key], x, return_dict=False, **attention)[0]
            if down:
                skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, upsample_size)
        return x

    def _resnets(
        self,
        layer: Layer,
        x: torch.Tensor,
        temb: torch.Tensor,
        skip: torch.Tensor | None,
        skipped: Collection[str],
    ) -> torch.Tensor:
        """Stock's ResNet of the layer first (or its shortcut), then the copies."""

        def joined(x: torch.Tensor) -> torch.Tensor:
            return x if skip is None else torch.cat([x, skip], dim=1)

        first = f"{layer.index}"
        if first in self.resnets and isinstance(self.resnets[first], Shortcut):
            x = self.resnets[first](joined(x))
        for block in layer.resnets:
            name = BlockName(self.name, "resnets", layer.index, block.number)
            module: Any = self.resnets[name.key]
            if str(name) not in skipped:
                x = self._call(module, joined(x), temb)
            elif block.number == 0 and module.conv_shortcut is not None:
                x = module.conv_shortcut(joined(x).contiguous())
        return x

    def _call(self, module: Callable, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(functools.partial(module, **kwargs), *args)
        return module(*args, **kwargs)
