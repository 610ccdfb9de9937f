"""The three networks with the bundle's inputs and outputs: named, fixed shapes, float32 or int32, NHWC."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from pocketfusion.errors import PocketfusionError

#: A `diffusers.StableDiffusionPipeline`: its components are set at run time, where mypy does not see them.
StablePipeline = Any


def nchw(x: torch.Tensor) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)


def nhwc(x: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H, W, C]."""
    return x.permute(0, 2, 3, 1)


class TextEncoder(nn.Module):
    """`input_ids` int32 [B, T], `attention_mask` int32 [B, T] -> `prompt_embeds` float32 [B, T, D].

    Where the text encoder's config has `use_attention_mask`, the mask reaches it, as in the stock pipeline; otherwise
    (CLIP) the mask is taken and ignored.
    """

    def __init__(self, text_encoder: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder
        self.use_mask = bool(getattr(text_encoder.config, "use_attention_mask", False))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.use_mask:
            # Adds nothing, but keeps the input in the graph: every bundle has the same signature.
            embeds = self.text_encoder(input_ids)[0] + 0.0 * attention_mask.unsqueeze(-1).float()
            return {"prompt_embeds": embeds}
        # Additive and 4-D already: the library's own mask building lowers to GATHER_ND, which GPUs refuse.
        additive = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        additive = additive.expand(-1, 1, attention_mask.shape[1], -1)
        return {"prompt_embeds": self.text_encoder(input_ids, attention_mask=additive)[0]}


class UNet(nn.Module):
    """`sample` [B, H, W, C], `timestep` [B], `encoder_hidden_states` [B, T, D] -> `noise_pred` [B, H, W, C].

    With embedded guidance also `timestep_cond` [B, E], the scale's embedding: a GPU delegate in fp16 cannot compute
    sines of thousands, so the runtime does.
    """

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        inputs = (nchw(sample), timestep, encoder_hidden_states)
        return {"noise_pred": nhwc(self.unet(*inputs, timestep_cond=timestep_cond, return_dict=False)[0])}


class Decoder(nn.Module):
    """`latents` [B, H, W, C], the sampler's, not yet divided by the scaling factor -> `image` [B, 8H, 8W, 3]."""

    def __init__(self, vae: Any):
        super().__init__()
        # The encoder is not part of this network.
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        z = nchw(latents / self.scaling_factor)
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return {"image": nhwc(self.decoder(z))}


def wrap(pipeline: StablePipeline) -> dict[str, nn.Module]:
    """The pipeline's three networks by the bundle's names. Raises PocketfusionError for kinds that do not fit."""
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    if not isinstance(pipeline.vae, AutoencoderKL):
        raise PocketfusionError(f"the vae is a {type(vae).__name__}: only AutoencoderKL can be exported")
    if isinstance(pipeline.unet, UNet2DConditionModel):
        if unet.config.class_embed_type or unet.config.addition_embed_type:
            raise PocketfusionError(
                "the UNet takes class or added embeddings (SDXL style): only SD 1 and 2 families export"
            )
        width, states = unet.config.cross_attention_dim, text_encoder.config.hidden_size
        if isinstance(width, int) and width != states:
            raise PocketfusionError(
                f"the UNet attends to states of width {width} but the text encoder gives {states}: "
                "the folder mixes models"
            )
    if vae.config.latent_channels != unet.config.in_channels:
        raise PocketfusionError(
            f"the vae has {vae.config.latent_channels} latent channels but the UNet takes {unet.config.in_channels}: "
            "the folder mixes models"
        )
    wrapped = {"text_encoder": TextEncoder(text_encoder), "unet": UNet(unet), "decoder": Decoder(vae)}
    return {name: network.eval() for name, network in wrapped.items()}
