"""An autoencoder whose decoder is narrower or shallower than its encoder: stock AutoencoderKL gives both one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ModelMixin  # noqa: F401  (pipelines look for ModelMixin here to load it)
from diffusers.models.autoencoders.vae import Decoder

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_json
from pocketfusion.models.loading import load_part


@dataclass(frozen=True)
class DecoderShape:
    """A decoder's widths, ResNets per stage less one, middle attention or not, norm groups; diffusers' terms."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    mid_block_add_attention: bool
    norm_num_groups: int

    @classmethod
    def of(cls, vae: AutoencoderKL) -> DecoderShape:
        """The shape of `vae`'s decoder, stock or slim."""
        own = {key: vae.config.get(f"decoder_{key}") for key in cls.__dataclass_fields__}
        values = {key: vae.config[key] if value is None else value for key, value in own.items()}
        return cls(**values | {"block_out_channels": tuple(values["block_out_channels"])})


class SlimAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` whose decoder has a shape of its own; the encoder, and so the latents, are the stock one's.

    A `decoder_*` argument that is None is the encoder's. Loads in stock diffusers once this module is imported.
    Raises PocketfusionError if the decoder's channels do not divide by its norm groups.
    """

    def __init__(
        self,
        decoder_block_out_channels: Sequence[int] | None = None,
        decoder_layers_per_block: int | None = None,
        decoder_mid_block_add_attention: bool | None = None,
        decoder_norm_num_groups: int | None = None,
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
        if any(width % shape.norm_num_groups for width in shape.block_out_channels):
            raise PocketfusionError(
                f"a decoder of {list(shape.block_out_channels)} channels cannot have {shape.norm_num_groups} norm "
                "groups: give a divisor of each"
            )
        self.decoder: Any = Decoder(
            in_channels=self.config.latent_channels,
            out_channels=self.config.out_channels,
            up_block_types=self.config.up_block_types,
            act_fn=self.config.act_fn,
            **asdict(shape),
        )

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """diffusers' hook: which keys of a config file are arguments of `__init__`."""
        return AutoencoderKL._get_init_keys(AutoencoderKL) | {
            f"decoder_{name}" for name in DecoderShape.__dataclass_fields__
        }


def vae_class(folder: Path) -> type[AutoencoderKL] | type[AutoencoderTiny]:
    """The class that the `config.json` in `folder` names; raises PocketfusionError if it is none of those known."""
    name = str(read_json(folder / "config.json").get("_class_name", "AutoencoderKL"))
    known = {kind.__name__: kind for kind in (AutoencoderKL, SlimAutoencoderKL, AutoencoderTiny)}
    if name not in known:
        raise PocketfusionError(f"{folder}: the vae is a {name!a}: only {', '.join(known)} are supported")
    return known[name]


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder in `folder` (a model folder's `vae/`), stock or slim, frozen in fp32, to train on its latents.

    Raises PocketfusionError if it is of another class, does not load, or lacks a weight.
    """
    kind = vae_class(folder)
    if kind is AutoencoderTiny:
        raise PocketfusionError(
            f"{folder}: the vae is an AutoencoderTiny, whose latents have no distribution to train on: put the "
            "model's AutoencoderKL there, and give the tiny one to export with --vae"
        )
    return load_part(kind, folder).requires_grad_(False).eval()


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] → fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] → uint8 [B, H, W, 3]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
