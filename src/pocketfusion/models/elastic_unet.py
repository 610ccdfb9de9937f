"""The elastic UNet: stock diffusers' UNet in which every block can be removed, copied, thinned or skipped.

SnapFusion (arXiv 2306.00980) sections 3.1 and 3.2 search over such networks; section 3.1's robust training skips
blocks at random, which `ElasticUNet.skipped` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DConditionModel  # noqa: F401  (pipelines look for ModelMixin here to load it)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import read_json
from pocketfusion.models.elastic.architecture import MID, Architecture, BlockName
from pocketfusion.models.elastic.elastic_blocks import ElasticStage
from pocketfusion.models.elastic.skips import check_architecture, layer_shapes
from pocketfusion.models.loading import load_part

#: What a UNet of SD's 1.x and 2.x family sets, key by key; other keys are free or at diffusers' default.
_FAMILY: dict[str, tuple[Any, ...]] = {
    "class_embed_type": (None,),
    "time_embedding_act_fn": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim_type": (None,),
    "num_class_embeds": (None,),
    "time_embedding_type": ("positional",),
    "transformer_layers_per_block": (1,),
    "resnet_time_scale_shift": ("default",),
    "resnet_out_scale_factor": (1.0, 1),
    "resnet_skip_time_act": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "mid_block_scale_factor": (1, 1.0),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False,),
    "attention_type": ("default",),
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
}
_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")


def check_family(config: Mapping[str, Any], name: str = "the UNet") -> None:
    """Raises PocketfusionError saying what differs unless `config` is that of an SD-1.x/2.x-family UNet."""
    kind = config.get("_class_name", "UNet2DConditionModel")
    if kind not in ("UNet2DConditionModel", "ElasticUNet"):
        raise PocketfusionError(
            f"{name} is a {kind}: only UNet2DConditionModel of Stable Diffusion's 1.x/2.x family is supported"
        )
    for key, allowed in _FAMILY.items():
        if config.get(key, allowed[0]) not in allowed:
            raise PocketfusionError(
                f"{name} is not of Stable Diffusion's 1.x/2.x family: its {key} is {config[key]!r} instead of "
                f"{allowed[0]!r}; SDXL and other families are not supported"
            )
    for key, allowed in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        for kind in config[key]:
            if kind not in allowed:
                raise PocketfusionError(
                    f"{name} is not of Stable Diffusion's 1.x/2.x family: its {key} holds {kind} instead of "
                    f"{' or '.join(allowed)}"
                )
    for key in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(config[key], int):
            raise PocketfusionError(
                f"{name} is not of Stable Diffusion's 1.x/2.x family: its {key} is {config[key]!r} instead of a number"
            )


class ElasticUNet(UNet2DConditionModel):
    """`UNet2DConditionModel` with an `Architecture`; without one it is the stock network, bit for bit.

    Weights of blocks that remain keep their stock names, so checkpoints and LoRA adapters of the base apply to them.
    `skipped`: names of blocks that every call leaves out (robust training). Raises PocketfusionError if the config is
    not SD-family or the architecture cannot run on it.
    """

    skip_list: Any = list  #: what holds the skips on their way; `train.memory.sharded` needs another type
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]

    def __init__(self, architecture: dict[str, Any] | None = None, **config: Any):
        super().__init__(**config)
        check_family(self.config)
        stock = Architecture.stock(self.config)
        self.architecture = stock if architecture is None else Architecture.model_validate(architecture)
        self.register_to_config(architecture=self.architecture.model_dump(mode="json"))
        check_architecture(self.architecture, self.config)
        self.skipped: frozenset[str] = frozenset()
        shapes = layer_shapes(self.config)

        def stages(side: str, modules: Iterable[nn.Module]) -> list[ElasticStage]:
            names = [name for name in self.architecture.stages if name.startswith(side)]
            return [
                ElasticStage(name, self.architecture.stages[name], module, shapes)
                for name, module in zip(names, modules, strict=True)
            ]

        self.down_blocks: Any = nn.ModuleList(stages("down", self.down_blocks))
        self.mid_block: Any = stages(MID, [self.mid_block])[0]
        self.up_blocks: Any = nn.ModuleList(stages("up", self.up_blocks))

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel) -> ElasticUNet:
        """A copy of a stock UNet, as `as_elastic` makes it."""
        return as_elastic(unet)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """diffusers' hook: which keys of a config file are arguments of `__init__`."""
        return {*UNet2DConditionModel._get_init_keys(UNet2DConditionModel), "architecture"}

    @apply_lora_scale("cross_attention_kwargs")
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[torch.Tensor]:
        """Latents [B, C, h, w], timesteps (number or [B]), text states [B, T, D] → prediction [B, C, h, w].

        `encoder_attention_mask` [B, T]: 1 where a token counts. The other arguments are stock's.
        """
        uneven = any(side % 2**self.num_upsamplers for side in sample.shape[-2:])
        if encoder_attention_mask is not None:
            encoder_attention_mask = ((1 - encoder_attention_mask.to(sample.dtype)) * -10000.0).unsqueeze(1)
        attention = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "encoder_attention_mask": encoder_attention_mask,
        }
        temb = self.time_embedding(self.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
        x = self.conv_in(sample)
        skips = self.skip_list([x])
        for stage in self.down_blocks:
            x = stage(x, temb, skips, self.skipped, **attention)
        x = self.mid_block(x, temb, skips, self.skipped, **attention)
        for stage in self.up_blocks:
            # An odd side was rounded up when halved: the next skip says what it was.
            left = len(skips) - len(stage.stage.layers)
            size = skips[left - 1].shape[2:] if uneven and left else None
            x = stage(x, temb, skips, self.skipped, size, **attention)
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

    def block(self, name: str) -> nn.Module:
        """The module of the block of that name; raises PocketfusionError if there is none."""
        self.architecture.get(name)
        at = BlockName.parse(name)
        return getattr(self.get_submodule(at.stage), at.kind)[at.key]


def as_elastic(unet: UNet2DConditionModel) -> ElasticUNet:
    """`unet` as an elastic one of its own architecture, with a copy of its weights.

    Raises PocketfusionError if it is not of SD's 1.x/2.x family.
    """
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    check_family(config)
    with torch.device("meta"):
        elastic = ElasticUNet(**config)
    elastic.load_state_dict({name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}, assign=True)
    return elastic.train(unet.training)


def as_stock(unet: ElasticUNet) -> UNet2DConditionModel:
    """A stock UNet with a copy of `unet`'s weights if its architecture is the stock one, else `unet` itself."""
    if unet.architecture != Architecture.stock(unet.config):
        return unet
    config = {key: value for key, value in unet.config.items() if not key.startswith("_") and key != "architecture"}
    with torch.device("meta"):
        stock = UNet2DConditionModel(**config)
    stock.load_state_dict({name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}, assign=True)
    return stock.train(unet.training)


def load_elastic(path: Any) -> ElasticUNet:
    """The UNet of a model folder, stock or evolved, as an elastic one in fp32.

    Raises PocketfusionError if it is not of SD's 1.x/2.x family, does not load, or lacks a weight.
    """
    folder = Path(path) / "unet"
    check_family(read_json(folder / "config.json"), str(folder))
    return load_part(ElasticUNet, folder)
