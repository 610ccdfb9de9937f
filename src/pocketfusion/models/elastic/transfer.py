"""Weights of one architecture carried over to another: kept, copied, or cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.elastic.architecture import Architecture, Block
from pocketfusion.models.elastic.units import Units, block_units, narrow
from pocketfusion.models.elastic_unet import ElasticUNet

Weights = dict[str, torch.Tensor]


def with_architecture(unet: ElasticUNet, architecture: Architecture) -> ElasticUNet:
    """A network of `architecture` with `unet`'s weights; `unet` is untouched.

    A block that `unet` lacks is a copy of the one before it in its layer. Where the copy's shape differs (of a ResNet
    that changes channels), what fits is copied and its last convolution begins at zero, so that it begins as the
    identity. A narrowed feed-forward keeps its strongest inner channels, as any part with fewer units does.
    Raises PocketfusionError if the architecture cannot run on this base, or wants weights that are gone.
    """
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        new = ElasticUNet(**{**config, "architecture": architecture.model_dump(mode="json")})
    old, wanted = unet.state_dict(), new.state_dict()
    values = {name: old[name].clone() for name, like in wanted.items() if _fits(old, name, like)}
    for name, source in _sources(unet.architecture, architecture).items():
        if any(f"{name}.{key}" not in values for key in new.block(name).state_dict()):
            made = _block_weights(_part(old, source), new.block(name))
            values |= {f"{name}.{key}": value for key, value in made.items()}
    missing = [name for name in wanted if name not in values]
    if missing:
        raise PocketfusionError(f"the weight {missing[0]} is no longer in this UNet: begin from the base's weights")
    new.load_state_dict(values, assign=True)
    return new.train(unet.training)


def without_units(unet: ElasticUNet, kept: Mapping[tuple[str, Units], torch.Tensor]) -> ElasticUNet:
    """`unet` with only the units `kept` (indices, ascending) of each named block's part; `unet` is untouched.

    Equal to `unet` with zeros in the columns that read the other units.
    """
    architecture, values = unet.architecture, dict(unet.state_dict())
    for (name, units), index in kept.items():
        architecture = architecture.keep_units(name, units.part, units.width(len(index)))
        for parameter in (*units.rows, units.columns):
            values[f"{name}.{parameter}"] = units.cut(parameter, values[f"{name}.{parameter}"], index)
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        new = ElasticUNet(**{**config, "architecture": architecture.model_dump(mode="json")})
    new.load_state_dict({name: value.detach().clone() for name, value in values.items()}, assign=True)
    return new.train(unet.training)


def _fits(old: Weights, name: str, like: torch.Tensor) -> bool:
    return name in old and old[name].shape == like.shape


def _part(weights: Weights, name: str) -> Weights:
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def _sources(old: Architecture, new: Architecture) -> dict[str, str]:
    """For each block of `new`: itself if `old` has it, else the nearest one before it in its layer that `old` has."""
    known, sources = set(old.names()), {}
    last: tuple[tuple, str] | None = None
    for at, _ in new.blocks():
        place = (at.stage, at.kind, at.index)
        if str(at) in known:
            last = (place, str(at))
        if last is None or last[0] != place:
            raise PocketfusionError(f"{at} is no longer in this UNet: begin from the base's weights to bring it back")
        sources[str(at)] = last[1]
    return sources


def _block_weights(source: Weights, target: nn.Module) -> Weights:
    """Weights for the block `target`, from those of the block that it is or copies."""
    source = _narrowed(source, target)
    if isinstance(target, ResnetBlock2D) and source["conv1.weight"].shape[1] != target.in_channels:
        return _resnet_copy(source, target)
    # what was cut away before is missing: `with_architecture` says so
    wanted = target.state_dict()
    return {name: source[name].clone() for name, like in wanted.items() if _fits(source, name, like)}


def _narrowed(source: Weights, target: nn.Module) -> Weights:
    """`source` with as many units of each part as `target` has, the strongest, where it has more."""
    for units in block_units(target):
        if units.columns not in source:
            continue
        there = replace(units, count=source[units.columns].shape[1] // units.size)
        if there.count > units.count:
            kept = there.strongest(source, units.count)
            source = {name: there.cut(name, value, kept) for name, value in source.items()}
    return source


def _resnet_copy(source: Weights, target: ResnetBlock2D) -> Weights:
    """A ResNet for other channels in: what fits is copied, the rest is new, the last convolution is zero.

    What is new is the same whenever it is made, so that a search that goes on copies what it would have copied.
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ResnetBlock2D(
            in_channels=target.in_channels,
            out_channels=target.out_channels,
            temb_channels=target.time_emb_proj.in_features,
            groups=target.norm1.num_groups,
        )
    narrow(made, Block(inner_channels=target.conv1.out_channels))
    fresh = made.state_dict()
    if "conv_shortcut.weight" in fresh:  # the hidden state comes first, then the skip: hand the first through
        width = target.out_channels
        fresh["conv_shortcut.weight"].zero_()[:, :width, 0, 0] = torch.eye(width)
        fresh["conv_shortcut.bias"].zero_()
    like = next(iter(source.values()))
    values = {
        name: (source[name] if _fits(source, name, value) and "shortcut" not in name else value).clone().to(like)
        for name, value in fresh.items()
    }
    for name in ("conv2.weight", "conv2.bias"):
        values[name].zero_()
    return values
