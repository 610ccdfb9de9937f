"""What an architecture costs on any device: parameters and multiply-adds, counted on shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pocketfusion.mobile.specs import multiply_adds
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic_unet import ElasticUNet


class Cost(NamedTuple):
    """Of one UNet call at batch 1; multiply-adds are those of matrix products (attention's too) and convolutions."""

    parameters: int
    multiply_adds: int


def unet_cost(config: Mapping[str, Any], architecture: Architecture, tokens: int) -> Cost:
    """`config`'s base with `architecture`, at its own latent size with text states of `tokens` tokens.

    Raises PocketfusionError if the base is not SD-family or the architecture cannot run on it.
    """
    plain = {key: value for key, value in config.items() if not key.startswith("_") and key != "architecture"}
    with torch.device("meta"):
        unet = ElasticUNet(**plain, architecture=architecture.model_dump(mode="json"))
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {
            "sample": torch.zeros(1, unet.config.in_channels, height, width),
            "timestep": torch.zeros(1),
            "encoder_hidden_states": torch.zeros(1, tokens, unet.config.cross_attention_dim),
        }
        return Cost(sum(p.numel() for p in unet.parameters()), multiply_adds(unet, inputs))
