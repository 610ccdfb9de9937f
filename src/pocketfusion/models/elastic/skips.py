"""Where skip connections go: followed from down layers to up layers, so that one that cannot line up is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.architecture import Architecture


@dataclass(frozen=True)
class Skip:
    """One skip connection: who gives it, its channels and its level (0 is the full latent resolution)."""

    giver: str
    channels: int
    level: int


@dataclass(frozen=True)
class Shape:
    """A layer's place: channels in (an up layer's without its skip) and out, the skip's channels, the level."""

    hidden: int
    out: int
    skip: int
    level: int


def stock_skips(config: Mapping[str, Any]) -> list[int]:
    """Channels of stock's skips in the order given: conv_in, then each down layer and downsampler."""
    channels = config["block_out_channels"]
    skips = [channels[0]]
    for i, width in enumerate(channels):
        skips += [width] * config["layers_per_block"] + ([width] if i + 1 < len(channels) else [])
    return skips


def layer_shapes(config: Mapping[str, Any]) -> dict[tuple[str, int], Shape]:
    """Each stock layer's shape, by stage and index."""
    channels, last = config["block_out_channels"], len(config["block_out_channels"]) - 1
    shapes = {}
    for i, width in enumerate(channels):
        before = channels[max(0, i - 1)]
        for j in range(config["layers_per_block"]):
            shapes[f"down_blocks.{i}", j] = Shape(before if j == 0 else width, width, 0, i)
    for j in range(2):
        shapes["mid_block", j] = Shape(channels[-1], channels[-1], 0, last)
    skips = stock_skips(config)
    for i, width in enumerate(reversed(channels)):
        before = channels[min(last, last - i + 1)]
        for j in range(config["layers_per_block"] + 1):
            shapes[f"up_blocks.{i}", j] = Shape(before if j == 0 else width, width, skips.pop(), last - i)
    return shapes


def check_architecture(architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Raises PocketfusionError naming the block and the reason if the architecture cannot run on `config`'s base.

    Checked: stages, layers and blocks exist in the base, channels agree from layer to layer, and every skip that a
    down layer gives is taken by an up layer of its channels and resolution.
    """
    stock, shapes = Architecture.stock(config), layer_shapes(config)
    unknown = [name for name in architecture.stages if name not in stock.stages]
    missing = [name for name in stock.stages if name not in architecture.stages]
    if unknown or missing:
        raise PocketfusionError(
            f"the architecture {'has' if unknown else 'lacks'} the stage {(unknown or missing)[0]}: "
            f"the base has {', '.join(stock.stages)}"
        )
    channels, level = config["block_out_channels"][0], 0
    skips = [Skip("conv_in", channels, 0)]
    for name, stage in architecture.stages.items():
        has_attention = {layer.index for layer in stock.stages[name].layers if layer.attentions}
        if stage.sampler and not stock.stages[name].sampler:
            raise PocketfusionError(f"{name} has no sampler in the base, so it cannot keep one: set sampler to false")
        for layer in stage.layers:
            where = f"{name} layer {layer.index}"
            shape = shapes.get((name, layer.index))
            if shape is None:
                raise PocketfusionError(
                    f"{where} is not in the base, whose {name} has {len(stock.stages[name].layers)}"
                )
            for kind in ("resnets", "attentions"):
                numbers = [block.number for block in getattr(layer, kind)]
                if len(set(numbers)) != len(numbers):
                    raise PocketfusionError(f"{where} names one of its {kind} twice: give each copy its own number")
            if layer.attentions and layer.index not in has_attention:
                raise PocketfusionError(f"{where} has no cross-attention in the base: there is none to take or copy")
            if channels != shape.hidden:
                raise PocketfusionError(
                    f"{where} takes {shape.hidden} channels but gets {channels}: keep the layer before it, "
                    "which changes them"
                )
            if level != shape.level:
                raise PocketfusionError(
                    f"{where} runs at 1/{2**level} of the latents' size, in the base at 1/{2**shape.level}: "
                    "a sampler was dropped on one side only"
                )
            if name.startswith("up"):
                _take(skips, where, shape)
            channels = shape.out
            if name.startswith("down"):
                skips.append(Skip(where, channels, level))
        if stage.sampler:
            level += 1 if name.startswith("down") else -1
            if name.startswith("down"):
                skips.append(Skip(f"{name}'s downsampler", channels, level))
    if skips:
        raise PocketfusionError(f"the skip of {skips[-1].giver} is taken by no up layer: drop that layer too")
    if channels != config["block_out_channels"][0] or level:
        raise PocketfusionError(
            f"the last stage gives {channels} channels at 1/{2**level} of the latents' size, but conv_out takes "
            f"{config['block_out_channels'][0]} at full size"
        )


def is_sound(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether `check_architecture` finds nothing."""
    try:
        check_architecture(architecture, config)
    except PocketfusionError:
        return False
    return True


def _take(skips: list[Skip], where: str, shape: Shape) -> None:
    if not skips:
        raise PocketfusionError(f"{where} finds no skip left: drop it too, or keep the down layer that gave its skip")
    skip = skips.pop()
    if (skip.channels, skip.level) != (shape.skip, shape.level):
        raise PocketfusionError(
            f"{where} takes a skip of {shape.skip} channels at 1/{2**shape.level} of the latents' size but gets that "
            f"of {skip.giver}, {skip.channels} at 1/{2**skip.level}: drop partners together"
        )
