"""Uniform channel pruning of an autoencoder's decoder (SnapFusion, arXiv 2306.00980, section 3.2 and appendix B.2).

The paper gives the ratio (50 %) and not which channels stay. Ours are the teacher's most important ones, as many of
each normalisation group, kept consistently wherever a channel is produced, normalised and consumed.

A norm of one channel a group is an instance norm: whatever level its channels have is thrown away, and a decoder that
ends in one cannot draw a flat colour. So a decoder too narrow for its groups gets fewer, each made of whole groups of
the teacher's. Where a student's group is a part of one group of the teacher's, its statistics estimate that group's
mean and variance; where it is made of r of them, those of their union (the mean of the r means; the mean of the r
variances plus the variance of the r means), which the teacher never divides by. They are equal only where the removed
channels repeat kept ones of their group: there the student is the teacher, with its groups merged alike; elsewhere it
is approximate, and the training repairs it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.slim_autoencoder import DecoderShape, SlimAutoencoderKL

Weights = Mapping[str, torch.Tensor]

#: Share of channels that the preset `tiny` removes: with one ResNet a stage and no attention, SD's decoder of 49.5 M
#: parameters becomes one of 0.9 M.
TINY_RATIO = 13 / 16
HALF_RATIO = 0.5
_CHANNELS = 4  #: of a norm group, where a stage has as many
_FEWEST = 2  #: one is an instance norm


def half_shape(vae: AutoencoderKL, ratio: float = HALF_RATIO) -> DecoderShape:
    """`vae`'s decoder without the share `ratio` of every stage's channels, to the nearest multiple of its norm groups.

    It has the largest number of groups that divides `vae`'s and leaves each 4 channels or more in every stage; one
    group if a stage has only 2 or 3. A decoder that loses nothing keeps its own if they have 2 or more.
    Raises PocketfusionError if ratio is not in [0, 1) or leaves a stage fewer than 2 channels.
    """
    _check_ratio(ratio)
    shape = DecoderShape.of(vae)
    narrowest = min(shape.block_out_channels)
    if (1 - ratio) * narrowest < _FEWEST:
        raise PocketfusionError(
            f"--ratio {ratio:g} leaves {(1 - ratio) * narrowest:.3g} of {narrowest} channels, fewer than the "
            f"{_FEWEST} that a norm group needs: choose at most {1 - _FEWEST / narrowest:.3g}"
        )
    if ratio == 0 and narrowest >= _FEWEST * shape.norm_num_groups:
        return shape
    wanted = [(1 - ratio) * width for width in shape.block_out_channels]
    groups = _most_groups(shape.norm_num_groups, min(wanted))
    kept = tuple(groups * round(width / groups) for width in wanted)
    return DecoderShape(kept, shape.layers_per_block, shape.mid_block_add_attention, groups)


def tiny_shape(vae: AutoencoderKL, ratio: float = TINY_RATIO) -> DecoderShape:
    """As `half_shape`, with one ResNet a stage, no attention, rounded up and to at least 4 channels a stage."""
    _check_ratio(ratio)
    shape = DecoderShape.of(vae)
    wanted = [max((1 - ratio) * width, min(_CHANNELS, width)) for width in shape.block_out_channels]
    groups = _most_groups(shape.norm_num_groups, min(wanted))
    return DecoderShape(tuple(groups * math.ceil(width / groups - 1e-9) for width in wanted), 0, False, groups)


def _most_groups(count: int, channels: float) -> int:
    """The largest divisor of `count` that leaves each group `_CHANNELS` of `channels`; else 1."""
    fitting = (n for n in range(1, count + 1) if count % n == 0 and _CHANNELS * n <= channels + 1e-9)
    return max(fitting, default=1)


def _check_ratio(ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise PocketfusionError(f"--ratio {ratio:g} is not between 0 and 1: give the share of channels to remove")


@dataclass
class Space:
    """Channels that are one: whatever writes or reads them keeps the same ones.

    `produced`: weights whose rows they are. `consumed`: weights (with the axis they are on, and the gain of the norm
    between) that read them. `vectors`: biases, gains and the like. `normed`: whether norm groups part them.
    """

    produced: list[str] = field(default_factory=list)
    consumed: list[tuple[str, int, str | None]] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    normed: bool = False

    def produce(self, layer: str) -> None:
        """`layer` writes these channels."""
        self.produced.append(f"{layer}.weight")
        self.vectors.append(f"{layer}.bias")

    def norm(self, layer: str) -> str:
        """A group norm of these channels; returns its gain's name."""
        self.normed = True
        self.vectors += [f"{layer}.weight", f"{layer}.bias"]
        return f"{layer}.weight"

    def importance(self, weights: Weights) -> torch.Tensor:
        """‖what writes the channel‖ · ‖what reads it, times its norm's gain‖, [channels]."""
        written = sum(weights[name].float().flatten(1).square().sum(1) for name in self.produced)
        read = torch.zeros(())
        for name, axis, gain in self.consumed:
            strength = weights[name].float().transpose(0, axis).flatten(1).square().sum(1)
            read = read + (strength * weights[gain].float().square() if gain else strength)
        return (written * read).sqrt()  # type: ignore[union-attr]

    def choose(self, weights: Weights, kept: int, groups: int, own_groups: int) -> torch.Tensor:
        """Indices [kept] of the most important channels, ascending, as many of each norm group.

        `groups` of the teacher's are merged to `own_groups`, each of neighbours; of the merged ones as many stay as
        can be equal, and the most important beyond.
        """
        if not self.normed:
            groups = own_groups = 1
        importance = self.importance(weights).view(groups, -1)
        place = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # in its own group
        order = importance.view(own_groups, -1).argsort(dim=1, descending=True, stable=True)
        by_place = place.view(own_groups, -1).gather(1, order).argsort(dim=1, stable=True)
        best = order.gather(1, by_place)[:, : kept // own_groups].sort(dim=1).values
        return (best + order.shape[1] * torch.arange(own_groups, device=best.device)[:, None]).flatten()


def decoder_spaces(student: Any, teacher: nn.Module) -> Iterator[Space]:
    """The channel spaces of `student` (a diffusers `Decoder`), named as `teacher`'s."""
    stream = Space()
    stream.produce("conv_in")
    attentions = student.mid_block.attentions
    for i in range(len(student.mid_block.resnets)):
        if i and attentions[i - 1] is not None:
            yield from _attention(f"mid_block.attentions.{i - 1}", stream)
        stream = yield from _resnet(f"mid_block.resnets.{i}", teacher, stream)
    for i, block in enumerate(student.up_blocks):
        for j in range(len(block.resnets)):
            stream = yield from _resnet(f"up_blocks.{i}.resnets.{j}", teacher, stream)
        if block.upsamplers is not None:
            stream.consumed.append((f"up_blocks.{i}.upsamplers.0.conv.weight", 1, None))
            yield stream
            stream = Space()
            stream.produce(f"up_blocks.{i}.upsamplers.0.conv")
    stream.consumed.append(("conv_out.weight", 1, stream.norm("conv_norm_out")))
    yield stream


def _resnet(name: str, teacher: nn.Module, stream: Space):
    """Yields the spaces that end in a ResNet block and returns the residual stream that leaves it."""
    inner = Space()
    stream.consumed.append((f"{name}.conv1.weight", 1, stream.norm(f"{name}.norm1")))
    inner.produce(f"{name}.conv1")
    inner.consumed.append((f"{name}.conv2.weight", 1, inner.norm(f"{name}.norm2")))
    yield inner
    # The teacher's: where a pruned block has as many channels in as out, it loses the shortcut that its teacher has.
    if teacher.get_submodule(name).conv_shortcut is not None:
        stream.consumed.append((f"{name}.conv_shortcut.weight", 1, None))
        yield stream
        stream = Space()
        stream.produce(f"{name}.conv_shortcut")
    stream.produce(f"{name}.conv2")
    return stream


def _attention(name: str, stream: Space) -> Iterator[Space]:
    gain = stream.norm(f"{name}.group_norm")
    stream.consumed += [(f"{name}.{part}.weight", 1, gain) for part in ("to_q", "to_k", "to_v")]
    match, value = Space(), Space()
    match.produce(f"{name}.to_q")
    match.consumed.append((f"{name}.to_k.weight", 0, None))
    match.vectors.append(f"{name}.to_k.bias")
    value.produce(f"{name}.to_v")
    value.consumed.append((f"{name}.to_out.0.weight", 1, None))
    stream.produce(f"{name}.to_out.0")
    yield match
    yield value


def prune_decoder(vae: AutoencoderKL, shape: DecoderShape) -> SlimAutoencoderKL:
    """`vae` with a decoder of `shape` that begins with the most important channels of its own; the rest is a copy.

    With `vae`'s own shape, the same network bit for bit. Blocks that `shape` has not are left out. Raises
    PocketfusionError if its norm groups are not made of whole groups of `vae`'s.
    """
    groups = DecoderShape.of(vae).norm_num_groups
    if groups % shape.norm_num_groups:
        raise PocketfusionError(
            f"{shape.norm_num_groups} norm groups are not made of whole ones of {groups}: choose a divisor"
        )
    config = {k: v for k, v in vae.config.items() if not k.startswith(("_", "decoder_"))}
    slim = SlimAutoencoderKL(
        **config,
        **{f"decoder_{name}": value for name, value in asdict(shape).items()},
    )
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        if (part := getattr(slim, name)) is not None:
            part.load_state_dict(getattr(vae, name).state_dict())
    slim.decoder.load_state_dict(pruned_weights(slim.decoder, vae.decoder, groups, shape.norm_num_groups))
    return slim.eval()


def pruned_weights(student: nn.Module, teacher: nn.Module, groups: int, own_groups: int) -> dict[str, torch.Tensor]:
    """The teacher's weights cut to the shapes of `student`: its state dict."""
    source, wanted = teacher.state_dict(), student.state_dict()
    values = {name: source[name] for name in wanted}
    for space in decoder_spaces(student, teacher):
        width = next(len(wanted[name]) for name in space.produced if name in wanted)
        kept = space.choose(source, width, groups, own_groups)
        places = [(name, 0) for name in (*space.produced, *space.vectors)]
        for name, axis in (*places, *((name, axis) for name, axis, _ in space.consumed)):
            if name in values:  # a shortcut that the student has no use for
                values[name] = values[name].index_select(axis, kept)
    for name in wanted:
        if ".to_q." in name:  # attention divides by the root of its head's width
            values[name] = values[name] * (len(wanted[name]) / len(source[name])) ** 0.5
    return {name: value.clone() for name, value in values.items()}
