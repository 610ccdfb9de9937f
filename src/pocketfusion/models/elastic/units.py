"""Units that pruning takes out of a block: where they lie in its weights, how weights are cut, how modules narrow.

Everything here is inside one block, between a layer that makes the units and the one that reads them, so that no
pruning touches another block: feed-forward channels (both halves of GEGLU), attention heads, and a ResNet's channels
between its convolutions in whole groups of the norm that is there, so that no group's statistics change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.architecture import Block, Part

PART_NAMES: dict[Part, str] = {
    "inner_channels": "ResNet inner channels",
    "self_heads": "self-attention heads",
    "cross_heads": "cross-attention heads",
    "feed_forward_units": "feed-forward units",
}
_FEED_FORWARD_STEP = 8  #: what vector units like, as `elastic_blocks.feed_forward_width`


@dataclass(frozen=True)
class Units:
    """The units of one part of a block. Parameters are named by their path inside of the block.

    `count` units of `size` channels; `step` of them are pruned together and at least as many stay. `rows`: parameters
    whose rows they are, `halves` times one after the other. `columns`: the weight that reads them. `scales`: those of
    `rows` whose norms, times that of the columns, are a unit's strength.
    """

    part: Part
    count: int
    size: int
    step: int
    rows: tuple[str, ...]
    columns: str
    scales: tuple[str, ...]
    halves: int = 1

    @property
    def reader(self) -> str:
        """The layer whose input they are."""
        return self.columns.removesuffix(".weight")

    @property
    def most(self) -> int:
        """How many of them may go: whole steps, leaving at least one."""
        return max(0, self.count // self.step - 1) * self.step

    def width(self, count: int) -> int:
        """`count` units as an architecture states them: channels of a ResNet, else units."""
        return count * self.size if self.part == "inner_channels" else count

    def parameters(self, weights: Mapping[str, torch.Tensor]) -> int:
        """Parameters of one unit."""
        return sum(weights[name].numel() for name in (*self.rows, self.columns)) // self.count

    def channels(self, kept: torch.Tensor) -> torch.Tensor:
        """Channels [K * size] of the units `kept` [K]."""
        return (kept[:, None] * self.size + torch.arange(self.size, device=kept.device)).flatten()

    def cut(self, name: str, value: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """The part of the parameter `name` that belongs to the units `kept`; the whole where it has none."""
        channels = self.channels(kept).to(value.device)
        if name == self.columns:
            return value.index_select(1, channels)
        if name not in self.rows:
            return value
        starts = torch.arange(self.halves, device=value.device) * self.count * self.size
        return value.index_select(0, (starts[:, None] + channels).flatten())

    def strength(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """[count] product of the norms of what makes each unit and of what reads it: no data, no metric."""
        read = weights[self.columns].float().transpose(0, 1).reshape(self.count, -1).norm(dim=1)
        for name in self.scales:
            read = read * weights[name].float().reshape(self.halves, self.count, -1).norm(dim=2).prod(0)
        return read

    def strongest(self, weights: Mapping[str, torch.Tensor], count: int) -> torch.Tensor:
        """Indices [count] of the strongest units, ascending."""
        return self.strength(weights).topk(count).indices.sort().values


def block_units(module: Any) -> list[Units]:
    """The units of a ResNet or cross-attention block, part by part."""
    if isinstance(module, ResnetBlock2D):
        groups = module.norm2.num_groups
        rows = tuple(f"{layer}.{kind}" for layer in ("conv1", "time_emb_proj", "norm2") for kind in ("weight", "bias"))
        size = module.norm2.num_channels // groups
        return [Units("inner_channels", groups, size, 1, rows, "conv2.weight", ("conv1.weight", "norm2.weight"))]
    found, path = [], "transformer_blocks.0"
    inner = module.transformer_blocks[0]
    attentions: tuple[tuple[Part, str], ...] = (("self_heads", "attn1"), ("cross_heads", "attn2"))
    for part, name in attentions:
        attention = getattr(inner, name, None)
        if attention is not None:
            at = f"{path}.{name}"
            rows = tuple(f"{at}.{layer}.weight" for layer in ("to_q", "to_k", "to_v"))
            size = attention.to_q.out_features // attention.heads
            out = f"{at}.to_out.0.weight"
            found.append(Units(part, attention.heads, size, 1, rows, out, (f"{at}.to_v.weight",)))
    at, width = f"{path}.ff.net", inner.ff.net[2].in_features
    rows = (f"{at}.0.proj.weight", f"{at}.0.proj.bias")
    step = min(_FEED_FORWARD_STEP, width)
    found.append(Units("feed_forward_units", width, 1, step, rows, f"{at}.2.weight", rows[:1], halves=2))
    return found


def narrow(module: Any, block: Block) -> None:
    """Takes out of `module`, in place, the units that `block` has not; the first ones stay.

    Raises PocketfusionError if the block wants more than there are, or parts of a unit.
    """
    for units in block_units(module):
        wanted = getattr(block, units.part)
        if wanted is None:
            continue
        step = units.width(1)
        count, rest = divmod(wanted, step)
        if rest or count > units.count:
            raise PocketfusionError(
                f"the architecture keeps {wanted} {PART_NAMES[units.part]} of a block that has "
                f"{units.width(units.count)}: give a multiple of {step} up to that"
            )
        _keep_first(module, units, count)


def _keep_first(module: Any, units: Units, count: int) -> None:
    kept = torch.arange(count)
    for name in (*units.rows, units.columns):
        path, _, kind = name.rpartition(".")
        layer: Any = module.get_submodule(path)
        setattr(layer, kind, nn.Parameter(units.cut(name, getattr(layer, kind).detach(), kept)))
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups, layer.num_channels = count, layer.weight.shape[0]
        elif isinstance(layer, nn.Conv2d):
            layer.out_channels, layer.in_channels = layer.weight.shape[:2]
        else:
            layer.out_features, layer.in_features = layer.weight.shape
    if units.part.endswith("heads"):
        attention = module.get_submodule(units.reader.removesuffix(".to_out.0"))
        attention.heads = attention.sliceable_head_dim = count
        attention.inner_dim = attention.inner_kv_dim = count * units.size
