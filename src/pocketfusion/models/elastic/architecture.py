"""Which blocks a UNet of Stable Diffusion's family has: SnapFusion's search space as a value, without torch.

A UNet is stages (`down_blocks.0` … `mid_block` … `up_blocks.3`), a stage is layers, and a layer is what stock
diffusers has at one index: a ResNet, then a cross-attention block (diffusers' Transformer2DModel), then the skip
connection that a down layer gives and an up layer takes. Blocks are removed and copied inside a layer, so the skips
stay as they are; dropping a whole layer drops its skip too. A block is named by its path in the network:
`up_blocks.1.attentions.2`, its first copy `up_blocks.1.attentions.2_1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from pocketfusion.errors import PocketfusionError

Kind = Literal["resnets", "attentions"]
#: Parts of a block whose units can be pruned.
Part = Literal["inner_channels", "self_heads", "cross_heads", "feed_forward_units"]
KIND_NAMES: dict[Kind, str] = {"attentions": "cross-attention", "resnets": "ResNet"}
MID = "mid_block"
MOST_BLOCKS = 7  #: of one kind in one layer
FEED_FORWARD_SHARES = (0.5, 0.25)  #: of the stock inner width that a thinned feed-forward may keep
_NAME = re.compile(
    r"^(?P<stage>(?:down|up)_blocks\.\d+|mid_block)\.(?P<kind>resnets|attentions)\.(?P<index>\d+)(?:_(?P<number>\d+))?$"
)


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Block(_Value):
    """One ResNet or cross-attention block; `number` 0 is the stock one, others are copies of it.

    A cross-attention block may lack its self-attention, and keep only a share of its feed-forward's inner width.
    The last four say how many units pruning left, where it took any: of a ResNet the channels between its two
    convolutions, of a cross-attention block heads and inner channels of the feed-forward.
    """

    number: int = Field(default=0, ge=0)
    self_attention: bool = True
    feed_forward: float = Field(default=1.0, gt=0, le=1)
    inner_channels: int | None = Field(default=None, gt=0)
    self_heads: int | None = Field(default=None, gt=0)
    cross_heads: int | None = Field(default=None, gt=0)
    feed_forward_units: int | None = Field(default=None, gt=0)

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: Callable[[Block], dict[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    @property
    def pruned(self) -> bool:
        """Whether it lacks units of any part."""
        return any(getattr(self, part) is not None for part in get_args(Part))


class Layer(_Value):
    """The stock layer `index` of its stage with the blocks that it has now, in the order in which they run."""

    index: int = Field(ge=0)
    resnets: tuple[Block, ...] = ()
    attentions: tuple[Block, ...] = ()


class Stage(_Value):
    """Layers in order, and whether the stage still changes the resolution at its end (where stock does)."""

    layers: tuple[Layer, ...]
    sampler: bool = True


@dataclass(frozen=True)
class BlockName:
    """A block's place, taken from and printed as its path in the network."""

    stage: str
    kind: Kind
    index: int
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> BlockName:
        """Reads `down_blocks.1.attentions.0`; raises PocketfusionError on anything else."""
        match = _NAME.match(text)
        if match is None:
            raise PocketfusionError(f"{text!r} names no block: write it like down_blocks.1.attentions.0")
        kind: Any = match["kind"]
        return cls(match["stage"], kind, int(match["index"]), int(match["number"] or 0))

    @property
    def key(self) -> str:
        """The name inside its stage's module dictionary: `0`, a copy `0_1`."""
        return f"{self.index}_{self.number}" if self.number else f"{self.index}"

    def __str__(self) -> str:
        return f"{self.stage}.{self.kind}.{self.key}"


class Architecture(_Value):
    """All stages by name, in the order in which they run."""

    stages: dict[str, Stage]

    @classmethod
    def stock(cls, config: Mapping[str, Any]) -> Architecture:
        """What a stock UNet2DConditionModel of `config` has."""
        layers, whole = config["layers_per_block"], (Block(),)
        stages = {}
        for i, kind in enumerate(config["down_block_types"]):
            attention = whole if kind.startswith("CrossAttn") else ()
            sampler = i + 1 < len(config["down_block_types"])
            stages[f"down_blocks.{i}"] = Stage(
                layers=tuple(Layer(index=j, resnets=whole, attentions=attention) for j in range(layers)),
                sampler=sampler,
            )
        mid = (Layer(index=0, resnets=whole, attentions=whole), Layer(index=1, resnets=whole))
        stages[MID] = Stage(layers=mid if config["mid_block_type"] else (), sampler=False)
        for i, kind in enumerate(config["up_block_types"]):
            attention = whole if kind.startswith("CrossAttn") else ()
            stages[f"up_blocks.{i}"] = Stage(
                layers=tuple(Layer(index=j, resnets=whole, attentions=attention) for j in range(layers + 1)),
                sampler=i + 1 < len(config["up_block_types"]),
            )
        return cls(stages=stages)

    def blocks(self) -> Iterator[tuple[BlockName, Block]]:
        """Every block with its name, in the order in which they run."""
        kinds: tuple[Kind, Kind] = ("resnets", "attentions")
        for stage, content in self.stages.items():
            for layer in content.layers:
                for kind in kinds:
                    for block in getattr(layer, kind):
                        yield BlockName(stage, kind, layer.index, block.number), block

    def names(self) -> list[str]:
        """Names of all blocks, in the order in which they run."""
        return [str(name) for name, _ in self.blocks()]

    def get(self, name: str) -> Block:
        """The block of that name; raises PocketfusionError if there is none."""
        wanted = BlockName.parse(name)
        for found, block in self.blocks():
            if found == wanted:
                return block
        raise PocketfusionError(f"the architecture has no block {name}: it has {', '.join(self.names()) or 'none'}")

    def count(self, stage: str, kind: Kind) -> int:
        """How many blocks of a kind a stage has."""
        return sum(len(getattr(layer, kind)) for layer in self.stages[stage].layers)

    def _change(self, name: str, change: Callable[[tuple[Block, ...], Block], tuple[Block, ...]]) -> Architecture:
        block, at = self.get(name), BlockName.parse(name)
        stage = self.stages[at.stage]
        layers = tuple(
            layer.model_copy(update={at.kind: change(getattr(layer, at.kind), block)})
            if layer.index == at.index
            else layer
            for layer in stage.layers
        )
        return Architecture(stages={**self.stages, at.stage: stage.model_copy(update={"layers": layers})})

    def remove(self, name: str) -> Architecture:
        """Without that block: its residual branch gives zero. The layer's skip stays."""
        return self._change(name, lambda blocks, block: tuple(b for b in blocks if b.number != block.number))

    def duplicate(self, name: str) -> Architecture:
        """With a copy of that block right behind it; raises PocketfusionError if the layer is full."""

        def insert(blocks: tuple[Block, ...], block: Block) -> tuple[Block, ...]:
            if len(blocks) >= MOST_BLOCKS:
                raise PocketfusionError(f"{name} cannot be copied: its layer has {MOST_BLOCKS} blocks, no more fit")
            copy = block.model_copy(update={"number": 1 + max(b.number for b in blocks)})
            at = blocks.index(block) + 1
            return (*blocks[:at], copy, *blocks[at:])

        return self._change(name, insert)

    def _update(self, name: str, **values: Any) -> Architecture:
        if BlockName.parse(name).kind != "attentions":
            raise PocketfusionError(f"{name} is a ResNet: it has no attention or feed-forward to change")
        return self._change(
            name, lambda blocks, block: tuple(b.model_copy(update=values) if b == block else b for b in blocks)
        )

    def without_self_attention(self, name: str) -> Architecture:
        """That block keeps its text cross-attention and feed-forward (MobileDiffusion, section 3.1)."""
        return self._update(name, self_attention=False, self_heads=None)

    def narrow_feed_forward(self, name: str, share: float) -> Architecture:
        """That block's feed-forward keeps `share` of the stock inner width."""
        return self._update(name, feed_forward=share, feed_forward_units=None)

    def keep_units(self, name: str, part: Part, count: int) -> Architecture:
        """That block keeps `count` units of a part; whether it has them is for `ElasticUNet` to say."""
        if (part == "inner_channels") != (BlockName.parse(name).kind == "resnets"):
            raise PocketfusionError(f"{name} has no {part.replace('_', ' ')} to prune")
        return self._change(
            name, lambda blocks, block: tuple(b.model_copy(update={part: count}) if b == block else b for b in blocks)
        )

    def drop_layer(self, stage: str, index: int) -> Architecture:
        """Without that layer: its blocks and its skip. The other side must drop the partner; see `check_skips`."""
        content = self.stages[stage]
        kept = tuple(layer for layer in content.layers if layer.index != index)
        if len(kept) == len(content.layers):
            raise PocketfusionError(f"{stage} has no layer {index}")
        return Architecture(stages={**self.stages, stage: content.model_copy(update={"layers": kept})})

    def drop_stage(self, stage: str) -> Architecture:
        """Without any layer of that stage, their blocks and their skips; a sampler stays."""
        return Architecture(stages={**self.stages, stage: self.stages[stage].model_copy(update={"layers": ()})})

    @property
    def depth(self) -> int:
        """The innermost level that the network still goes down to; 0 is the latents' resolution."""
        return sum(stage.sampler for name, stage in self.stages.items() if name.startswith("down"))

    def drop_level(self, level: int) -> Architecture:
        """Without that level, the innermost: its down and up stage, the mid block and the samplers that lead there."""
        if level != self.depth or not level:
            raise PocketfusionError(f"level {level} cannot be dropped: the innermost is {self.depth}, and 0 stays")
        outermost = sum(name.startswith("down") for name in self.stages) - 1
        down, up = f"down_blocks.{level}", f"up_blocks.{outermost - level}"
        smaller = self.drop_stage(MID).drop_stage(down).drop_stage(up)
        return smaller.drop_sampler(f"down_blocks.{level - 1}").drop_sampler(up)

    def drop_sampler(self, stage: str) -> Architecture:
        """That stage keeps its resolution at its end, and so gives (down) or changes nothing there."""
        return Architecture(stages={**self.stages, stage: self.stages[stage].model_copy(update={"sampler": False})})
