"""Small stock UNets of SD's family, and the stock network changed by hand: what the elastic one must equal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

#: SD-1.x's block pattern; channels change in every stage but the last.
SD1: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [8, 16, 24, 24],
    "layers_per_block": 2,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
#: As SD-2.x: linear projections, heads per stage, attention in fp32.
SD2 = SD1 | {"use_linear_projection": True, "attention_head_dim": [2, 4, 3, 3], "upcast_attention": True}
NO_MID = SD1 | {"mid_block_type": None}
ONE_LAYER = SD1 | {"layers_per_block": 1, "block_out_channels": [8, 8, 16, 16]}
TWO_STAGES = SD1 | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
}


def stock_unet(config: dict[str, Any], seed: int = 0) -> UNet2DConditionModel:
    """A stock UNet in which no weight is at its trivial start, so that a misplaced one shows."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return unet


def inputs(config: dict[str, Any], height: int = 8, width: int = 8, *, mask: bool = False) -> dict[str, Any]:
    """Latents, timesteps and text states of a batch of 2; `mask`: with an encoder_attention_mask."""
    generator = torch.Generator().manual_seed(1)
    values: dict[str, Any] = {
        "sample": torch.randn(2, config["in_channels"], height, width, generator=generator),
        "timestep": torch.tensor([37, 801]),
        "encoder_hidden_states": torch.randn(2, 6, config["cross_attention_dim"], generator=generator),
    }
    if mask:
        values["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    return values


@torch.no_grad()
def run(unet: UNet2DConditionModel, given: dict[str, Any]) -> torch.Tensor:
    """The prediction."""
    return unet(**given).sample


def block_names(unet: UNet2DConditionModel) -> list[str]:
    """Paths of a stock UNet's ResNets and cross-attention blocks, found by their classes."""
    return [name for name, module in unet.named_modules() if isinstance(module, (ResnetBlock2D, Transformer2DModel))]


@contextmanager
def zeroed(unet: UNet2DConditionModel, names: Iterable[str]) -> Iterator[UNet2DConditionModel]:
    """The stock network with the residual branch of each named block giving zero, for the length of the block."""
    saved = []
    for name in names:
        block = unet.get_submodule(name)
        last = block.conv2 if isinstance(block, ResnetBlock2D) else block.proj_out
        for parameter in last.parameters():
            saved.append((parameter, parameter.detach().clone()))
            parameter.data.zero_()
    try:
        yield unet
    finally:
        for parameter, value in saved:
            parameter.data.copy_(value)
