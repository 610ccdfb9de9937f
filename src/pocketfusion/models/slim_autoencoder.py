"""An autoencoder whose decoder is narrower or shallower than its encoder: stock AutoencoderKL gives both one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  (pipelines look for ModelMixin here to load it)
from diffusers.models.autoencoders.vae import Decoder
from torch import nn

from pocketfusion.errors import PocketfusionError


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's widths, ResNets per stage less one, whether its middle has attention; diffusers' terms.

    `norm_num_groups`: groups of the norms of each stage's channels, in the order of `block_out_channels`.
    """

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    mid_block_add_attention: bool
    norm_num_groups: tuple[int, ...]

    @classmethod
    def of(cls, vae: AutoencoderKL) -> DecoderShape:
        """The shape of `vae`'s decoder, stock or slim."""
        own = {key: vae.config.get(f"decoder_{key}") for key in cls.__dataclass_fields__}
        values = {key: vae.config[key] if value is None else value for key, value in own.items()}
        widths, groups = tuple(values["block_out_channels"]), values["norm_num_groups"]
        groups = (groups,) * len(widths) if isinstance(groups, int) else tuple(groups)
        return cls(**values | {"block_out_channels": widths, "norm_num_groups": groups})


def _regroup(decoder: Any, groups: tuple[int, ...]) -> None:
    """Gives each norm of a `Decoder` its stage's number of groups; a block's first norm reads the stage before."""
    stages = groups[::-1]  # as the up blocks come
    for part in (decoder.mid_block, *decoder.up_blocks[:1]):
        _set_groups(part, stages[0])
    for before, own, block in zip(stages, stages[1:], decoder.up_blocks[1:], strict=False):
        _set_groups(block, own)
        block.resnets[0].norm1.num_groups = before
    decoder.conv_norm_out.num_groups = stages[-1]


def _set_groups(part: nn.Module, count: int) -> None:
    for module in part.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = count


class SlimAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` whose decoder has a shape of its own; the encoder, and so the latents, are the stock one's.

    A `decoder_*` argument that is None is the encoder's. Loads in stock diffusers once this module is imported.
    Raises PocketfusionError if a stage's channels do not divide by its norm groups.
    """

    def __init__(
        self,
        decoder_block_out_channels: Sequence[int] | None = None,
        decoder_layers_per_block: int | None = None,
        decoder_mid_block_add_attention: bool | None = None,
        decoder_norm_num_groups: Sequence[int] | None = None,
        **config: Any,
    ):
        super().__init__(**config)
        self.register_to_config(
            decoder_block_out_channels=decoder_block_out_channels,
            decoder_layers_per_block=decoder_layers_per_block,
            decoder_mid_block_add_attention=decoder_mid_block_add_attention,
            decoder_norm_num_groups=decoder_norm_num_groups,
        )
        shape = DecoderShape.of(self)
        widths, groups = shape.block_out_channels, shape.norm_num_groups
        if len(widths) != len(groups) or any(width % count for width, count in zip(widths, groups, strict=True)):
            raise PocketfusionError(
                f"a decoder of {list(widths)} channels cannot have {list(groups)} norm groups: give one divisor a "
                "stage"
            )
        self.decoder: Any = Decoder(
            in_channels=self.config.latent_channels,
            out_channels=self.config.out_channels,
            up_block_types=self.config.up_block_types,
            act_fn=self.config.act_fn,
            **asdict(shape) | {"norm_num_groups": 1},  # diffusers takes one number; each stage has its own below
        )
        _regroup(self.decoder, groups)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """diffusers' hook: which keys of a config file are arguments of `__init__`."""
        return AutoencoderKL._get_init_keys(AutoencoderKL) | {
            f"decoder_{name}" for name in DecoderShape.__dataclass_fields__
        }


def vae_class(config: dict[str, Any]) -> type[AutoencoderKL]:
    """The class that a `vae/config.json` names; raises PocketfusionError if it is neither AutoencoderKL nor ours."""
    name = config.get("_class_name", "AutoencoderKL")
    known = {kind.__name__: kind for kind in (AutoencoderKL, SlimAutoencoderKL)}
    if name not in known:
        raise PocketfusionError(f"the vae is a {name}: only {' and '.join(known)} are supported")
    return known[name]


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder in `folder` (a model folder's `vae/`), stock or slim, frozen in fp32.

    Raises PocketfusionError if it is of another class or does not load.
    """
    try:
        kind = vae_class(AutoencoderKL.load_config(folder))
        return kind.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False).eval()
    except PocketfusionError as error:
        raise PocketfusionError(f"{folder}: {error}") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PocketfusionError(f"the autoencoder {folder} could not be loaded ({reason[:200]})") from None
