"""Uniform channel pruning of an autoencoder's decoder (SnapFusion, arXiv 2306.00980, section 3.2 and appendix B.2).

The paper gives the ratio (50 %) and not which channels stay. Ours are the teacher's most important ones, as many of
each normalisation group, kept consistently wherever a channel is produced, normalised and consumed. So a student's
group is a part of one group of the teacher's, and its statistics estimate the same mean and variance; they are equal
only where the removed channels repeat kept ones of their group: pruning is exact there and approximate elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.slim_autoencoder import DecoderShape, SlimAutoencoderKL

Weights = Mapping[str, torch.Tensor]

#: Share of channels that the preset `tiny` removes: with one ResNet a stage and no attention, SD's decoder of 49.5 M
#: parameters becomes one of 1.0 M.
TINY_RATIO = 13 / 16
HALF_RATIO = 0.5


def half_shape(vae: AutoencoderKL, ratio: float = HALF_RATIO) -> DecoderShape:
    """`vae`'s decoder without the share `ratio` of every stage's channels, to the nearest multiple of the norm groups.

    Raises PocketfusionError if ratio is not in [0, 1) or a stage would have fewer channels than groups.
    """
    _check_ratio(ratio)
    shape, groups = DecoderShape.of(vae), vae.config.norm_num_groups
    kept = tuple(groups * round((1 - ratio) * width / groups) for width in shape.block_out_channels)
    narrowest = min(shape.block_out_channels)
    if (1 - ratio) * narrowest < groups:
        raise PocketfusionError(
            f"--ratio {ratio:g} leaves {(1 - ratio) * narrowest:.3g} of {narrowest} channels, fewer than the "
            f"decoder's {groups} norm groups: choose at most {1 - groups / narrowest:.3g}"
        )
    return DecoderShape(kept, shape.layers_per_block, shape.mid_block_add_attention)


def tiny_shape(vae: AutoencoderKL, ratio: float = TINY_RATIO) -> DecoderShape:
    """As `half_shape`, with one ResNet a stage, no attention and at least one channel a norm group (rounded up)."""
    _check_ratio(ratio)
    groups = vae.config.norm_num_groups
    widths = DecoderShape.of(vae).block_out_channels
    return DecoderShape(tuple(groups * math.ceil((1 - ratio) * w / groups - 1e-9) for w in widths), 0, False)


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

    def choose(self, weights: Weights, kept: int, groups: int) -> torch.Tensor:
        """Indices [kept] of the most important channels, ascending, as many of each norm group."""
        importance = self.importance(weights)
        parts = importance.view(groups if self.normed else 1, -1)
        best = parts.topk(kept // len(parts), dim=1).indices.sort(dim=1).values
        return (best + parts.shape[1] * torch.arange(len(parts), device=best.device)[:, None]).flatten()


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

    With `vae`'s own shape, the same network bit for bit. Blocks that `shape` has not are left out.
    """
    config = {k: v for k, v in vae.config.items() if not k.startswith(("_", "decoder_"))}
    slim = SlimAutoencoderKL(
        **config,
        decoder_block_out_channels=shape.block_out_channels,
        decoder_layers_per_block=shape.layers_per_block,
        decoder_mid_block_add_attention=shape.mid_block_add_attention,
    )
    for name in ("encoder", "quant_conv", "post_quant_conv"):
        if (part := getattr(slim, name)) is not None:
            part.load_state_dict(getattr(vae, name).state_dict())
    slim.decoder.load_state_dict(pruned_weights(slim.decoder, vae.decoder, vae.config.norm_num_groups))
    return slim.eval()


def pruned_weights(student: nn.Module, teacher: nn.Module, groups: int) -> dict[str, torch.Tensor]:
    """The teacher's weights cut to the shapes of `student`: its state dict."""
    source, wanted = teacher.state_dict(), student.state_dict()
    values = {name: source[name] for name in wanted}
    for space in decoder_spaces(student, teacher):
        width = next(len(wanted[name]) for name in space.produced if name in wanted)
        kept = space.choose(source, width, groups)
        places = [(name, 0) for name in (*space.produced, *space.vectors)]
        for name, axis in (*places, *((name, axis) for name, axis, _ in space.consumed)):
            if name in values:  # a shortcut that the student has no use for
                values[name] = values[name].index_select(axis, kept)
    for name in wanted:
        if ".to_q." in name:  # attention divides by the root of its head's width
            values[name] = values[name] * (len(wanted[name]) / len(source[name])) ** 0.5
    return {name: value.clone() for name, value in values.items()}
