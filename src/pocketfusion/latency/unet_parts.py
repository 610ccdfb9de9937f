"""The parts that a UNet's latency is the sum of, listed from its config and architecture alone, without torch.

SnapFusion (arXiv 2306.00980) section 3.2 looks a block's latency up in a table measured on the phone. A part here is a
ResNet (an up path's concatenation with its skip inside), what a removed ResNet leaves, a cross-attention block, or one
of the pieces that every network keeps. Its key is made of shapes only: parts of one key cost the same and share a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.architecture import FEED_FORWARD_SHARES, Architecture, Block, BlockName, Layer
from pocketfusion.models.elastic.presets import paper_stages
from pocketfusion.models.elastic.skips import Shape, check_architecture, layer_shapes

PartKind = Literal["conv_in", "time", "resnet", "shortcut", "attention", "downsample", "upsample", "conv_out"]
#: What a table prints for each kind, in this order.
KIND_NAMES: dict[PartKind, str] = {
    "attention": "cross-attention",
    "resnet": "ResNet",
    "shortcut": "shortcut of a removed ResNet",
    "downsample": "downsampler",
    "upsample": "upsampler",
    "conv_in": "conv_in",
    "time": "time embedding",
    "conv_out": "conv_out",
}
#: Config keys that set the shapes of a UNet's parts: two bases that agree in them share a table.
SHAPE_KEYS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "down_block_types",
    "mid_block_type",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "use_linear_projection",
    "norm_num_groups",
    "conv_in_kernel",
    "conv_out_kernel",
)


@dataclass(frozen=True)
class Part:
    """One part of a network.

    `name`: its path in the network (`up_blocks.1.resnets.0`). `stage`: the stage that it is counted to; conv_in,
    conv_out and the time embedding have none. `sizes`: (height, width) in and out. `channels`: of the hidden state in
    and out; `skip`: of the skip connection joined to it.
    """

    key: str
    kind: PartKind
    name: str
    stage: str
    sizes: tuple[tuple[int, int], tuple[int, int]]
    channels: tuple[int, int]
    skip: int = 0


def base_shapes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `SHAPE_KEYS` in `config`, tuples as lists, as they are stored."""
    return {
        key: list(value) if isinstance(value := config.get(key), (list, tuple)) else value for key in SHAPE_KEYS
    } | {"conv_in_kernel": config.get("conv_in_kernel") or 3, "conv_out_kernel": config.get("conv_out_kernel") or 3}


def level_sizes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of the hidden state at each level; level 0 is the latents'."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    levels = range(len(config["block_out_channels"]))
    return [(-(-height // 2**level), -(-width // 2**level)) for level in levels]


def list_parts(config: Mapping[str, Any], architecture: Architecture, text_length: int) -> list[Part]:
    """The parts of the network of `architecture` on `config`'s base, in the order in which they run.

    `text_length`: tokens of the prompt's states. Raises PocketfusionError if the architecture cannot run on the base.
    """
    check_architecture(architecture, config)
    shapes, sizes = layer_shapes(config), level_sizes(config)
    channels, temb = config["block_out_channels"], config["block_out_channels"][0] * 4
    groups, last = config.get("norm_num_groups") or 32, len(sizes) - 1
    kernels = [config.get(key) or 3 for key in ("conv_in_kernel", "conv_out_kernel")]

    def part(
        kind: PartKind,
        name: str,
        stage: str,
        levels: tuple[int, int],
        width: tuple[int, int],
        extra: str,
        skip: int = 0,
    ) -> Part:
        before, after = sizes[levels[0]], sizes[levels[1]]
        shape = f"{width[0]}{f'+{skip}' if skip else ''}->{width[1]}@{before[0]}x{before[1]}"
        if before != after:
            shape += f"->{after[0]}x{after[1]}"
        return Part(f"{kind}:{shape}{extra}", kind, name, stage, (before, after), width, skip)

    def resnet(name: BlockName, block: Block, shape: Shape) -> Part:
        hidden = shape.out if name.number else shape.hidden
        level = (shape.level, shape.level)
        extra = f",temb{temb},groups{groups}" + (f",inner{block.inner_channels}" if block.inner_channels else "")
        return part("resnet", str(name), name.stage, level, (hidden, shape.out), extra, shape.skip)

    def attention(name: BlockName, block: Block, shape: Shape) -> Part:
        extra = f",heads{_heads(config, shape.level)},text{text_length}x{config['cross_attention_dim']},groups{groups}"
        extra += ",linear" if config.get("use_linear_projection") else ""
        extra += "" if block.self_attention else ",no-self"
        extra += "" if block.feed_forward == 1 else f",ff{block.feed_forward:g}"
        for label in ("self_heads", "cross_heads", "feed_forward_units"):
            if (left := getattr(block, label)) is not None:
                extra += f",{label.replace('_', '-')}{left}"
        level = (shape.level, shape.level)
        return part("attention", str(name), name.stage, level, (shape.out, shape.out), extra)

    def layer_parts(stage: str, layer: Layer) -> Iterator[Part]:
        shape = shapes[stage, layer.index]
        removed = not any(block.number == 0 for block in layer.resnets)
        if removed and shape.hidden + shape.skip != shape.out:
            name, level = f"{stage}.resnets.{layer.index}", (shape.level, shape.level)
            yield part("shortcut", name, stage, level, (shape.hidden, shape.out), "", shape.skip)
        for block in layer.resnets:
            yield resnet(BlockName(stage, "resnets", layer.index, block.number), block, shape)
        for block in layer.attentions:
            yield attention(BlockName(stage, "attentions", layer.index, block.number), block, shape)

    parts = [
        part("conv_in", "conv_in", "", (0, 0), (config["in_channels"], channels[0]), f",kernel{kernels[0]}"),
        Part(f"time:{channels[0]}->{temb}", "time", "time_embedding", "", ((1, 1), (1, 1)), (channels[0], temb)),
    ]
    for stage, content in architecture.stages.items():
        for layer in content.layers:
            parts += layer_parts(stage, layer)
        if content.sampler:
            index = int(stage.split(".")[1])
            if stage.startswith("down"):
                width, name = channels[index], f"{stage}.downsamplers.0"
                parts.append(part("downsample", name, stage, (index, index + 1), (width, width), ""))
            else:
                level = last - index
                width, name = channels[level], f"{stage}.upsamplers.0"
                parts.append(part("upsample", name, stage, (level, level - 1), (width, width), ""))
    width, extra = (channels[0], config["out_channels"]), f",kernel{kernels[1]},groups{groups}"
    parts.append(part("conv_out", "conv_out", "", (0, 0), width, extra))
    return parts


def _heads(config: Mapping[str, Any], level: int) -> int:
    # diffusers' attention_head_dim is a number of heads, unless num_attention_heads is set
    heads = config.get("num_attention_heads") or config["attention_head_dim"]
    return heads if isinstance(heads, int) else heads[level]


def action_architectures(config: Mapping[str, Any]) -> list[Architecture]:
    """Architectures that together hold every part that removing, copying and thinning blocks of the base can need.

    The base; every block removed; every block copied; each way to thin all cross-attention blocks.
    """
    base = Architecture.stock(config)
    copied, thinned = base, []
    for name in base.names():
        copied = copied.duplicate(name)
    for self_attention, share in product((True, False), (1.0, *FEED_FORWARD_SHARES)):
        thin = base
        for name in base.names():
            if BlockName.parse(name).kind == "attentions":
                thin = thin if self_attention else thin.without_self_attention(name)
                thin = thin if share == 1 else thin.narrow_feed_forward(name, share)
        thinned += [thin] if thin != base else []
    return [base, bare(config), copied, *thinned]


def bare(config: Mapping[str, Any]) -> Architecture:
    """The base without any block: what removing cannot take away."""
    architecture = Architecture.stock(config)
    for name in architecture.names():
        architecture = architecture.remove(name)
    return architecture


def stage_names(config: Mapping[str, Any]) -> dict[str, str]:
    """SnapFusion's names (Table 3) of diffusers' stages: Down-1 … Mid … Up-3."""
    stages = paper_stages(Architecture.stock(config))
    return {part: name for name, parts in stages.items() for part in parts}


def unknown_part(part: Part) -> PocketfusionError:
    """The error for a part that a table lacks."""
    return PocketfusionError(
        f"the latency table has no entry for {part.name} ({part.key}): profile the base again without --base-only"
    )
