"""Published architectures, applied to a base: SnapFusion's efficient UNet (arXiv 2306.00980, Table 3).

The table counts blocks per stage and does not say where they sit or what becomes of the skips. `snapfusion` is one
reading in which every skip that is given is taken; docs/efficient-unet.md sets it beside the paper's own figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.architecture import MID, Architecture, Kind
from pocketfusion.models.elastic.skips import check_architecture

_PATTERN = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}


def paper_stages(architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Stages under SnapFusion's names, Down-1 … Mid … Up-3: its Mid is everything at the lowest resolution."""
    last = sum(name.startswith("down") for name in architecture.stages) - 1
    down = {f"Down-{i + 1}": (f"down_blocks.{i}",) for i in range(last)}
    up = {f"Up-{i}": (f"up_blocks.{i}",) for i in range(1, last + 1)}
    return {**down, "Mid": (f"down_blocks.{last}", MID, "up_blocks.0"), **up}


def stage_counts(architecture: Architecture, kind: Kind) -> dict[str, int]:
    """Blocks of a kind in each of SnapFusion's stages, by its names."""
    stages = paper_stages(architecture)
    return {name: sum(architecture.count(stage, kind) for stage in part) for name, part in stages.items()}


def check_pattern(config: Mapping[str, Any]) -> None:
    """Raises PocketfusionError naming what differs unless `config` has SD's four stages with 38 blocks."""
    for key, wanted in _PATTERN.items():
        given = config[key]
        if (list(given) if isinstance(given, (list, tuple)) else given) != wanted:
            raise PocketfusionError(
                f"the UNet's {key} is {given!r}, but SnapFusion's table is for Stable Diffusion's 38 blocks with "
                f"{wanted!r}: use a base of that shape"
            )


def _attention_off_full_resolution(config: Mapping[str, Any]) -> Architecture:
    check_pattern(config)
    architecture = Architecture.stock(config)
    for stage in ("down_blocks.0", "up_blocks.3"):
        for layer in architecture.stages[stage].layers:
            architecture = architecture.remove(f"{stage}.attentions.{layer.index}")
    return architecture


def snapfusion_attention(config: Mapping[str, Any]) -> Architecture:
    """Table 3's changes of cross-attention alone: none at full resolution, six in Up-1; all 22 ResNets stay."""
    architecture = _attention_off_full_resolution(config)
    for index in range(3):
        architecture = architecture.duplicate(f"up_blocks.1.attentions.{index}")
    return architecture


def snapfusion(config: Mapping[str, Any]) -> Architecture:
    """SnapFusion's efficient UNet (Table 3) on a base of SD-1.5's block pattern.

    Of the reading's choices, the paper states none:
    - A down stage that loses a ResNet loses its second layer (the first one changes channels), and the up layer that
      took that layer's skip goes with it, so that all others keep the skip they were trained with: Down-3 to one
      layer and Up-1 to two, Down-4 to one and Up-0 to two. With mid's first ResNet, Mid has the table's four.
    - Down-3 keeps two cross-attention blocks, both in its remaining layer, and Up-1 has its six as three a layer:
      copies of the layer's own.
    Raises PocketfusionError if the base has another block pattern.
    """
    architecture = _attention_off_full_resolution(config)
    for down, up in (("down_blocks.2", "up_blocks.1"), ("down_blocks.3", "up_blocks.0")):
        architecture = architecture.drop_layer(down, 1).drop_layer(up, 0)
    architecture = architecture.remove(f"{MID}.resnets.1")
    for name in ("down_blocks.2.attentions.0", *(f"up_blocks.1.attentions.{i}" for i in (1, 1, 2, 2))):
        architecture = architecture.duplicate(name)
    check_architecture(architecture, config)
    return architecture


PRESETS: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {"snapfusion": snapfusion}
