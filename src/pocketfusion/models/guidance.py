"""One guided prediction, whatever guidance costs the UNet: two rows a sample, an embedded scale, or a folded one."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.sampling import Guidance


def guidance_embedding(guidance_scale: torch.Tensor, dim: int) -> torch.Tensor:
    """The UNet's `timestep_cond` [B, dim] (config `time_cond_proj_dim`) for guidance scales [B].

    Sin then cos of 1000 (w - 1) / 10000^(i / (dim/2 - 1)): what diffusers' stock pipeline passes, so that a distilled
    folder draws the same there.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=guidance_scale.device) / max(half - 1, 1)
    angles = 1000.0 * (guidance_scale.float()[:, None] - 1) * 10000.0 ** -exponents[None]
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def guidance_of(unet: UNet2DConditionModel, stated: Guidance | None) -> Guidance:
    """How `unet` is guided: as its folder states, else by whether it takes an embedded scale.

    Raises PocketfusionError if the statement and the UNet do not agree.
    """
    embeds = unet.config.time_cond_proj_dim is not None
    guidance = stated or ("embedded" if embeds else "classifier-free")
    if (guidance == "embedded") != embeds:
        raise PocketfusionError(
            f"the folder's guidance is '{guidance}' but its UNet {'takes' if embeds else 'has no input for'} a "
            "guidance scale: its sampling.json and its unet/ belong to different models"
        )
    return guidance


def guided_prediction(
    unet: UNet2DConditionModel,
    z_t: torch.Tensor,
    timesteps: torch.Tensor,
    states: torch.Tensor,
    null_states: torch.Tensor,
    guidance_scale: torch.Tensor,
    guidance: Guidance = "classifier-free",
) -> torch.Tensor:
    """ṽ = w v(c) − (w − 1) v(∅), fp32, with the gradient through both branches (SnapFusion, arXiv 2306.00980).

    z_t [B, C, h, w], timesteps [B] or scalar, states [B, T, D], null_states [T, D] or [B, T, D], guidance_scale [B].
    One call, whatever the guidance: the unconditional branch of the samples with w ≠ 1 is a part of the same batch and
    sees the same z_t.
    """
    timesteps = torch.as_tensor(timesteps, device=z_t.device).expand(len(z_t))
    if guidance == "folded":
        return unet(z_t, timesteps, states).sample.float()
    if guidance == "embedded":
        config = getattr(unet, "module", unet).config  # a distributed wrapper has none of its own
        condition = guidance_embedding(guidance_scale.to(z_t.device), config.time_cond_proj_dim)
        return unet(z_t, timesteps, states, timestep_cond=condition.to(z_t.dtype)).sample.float()
    scale = guidance_scale.to(z_t.device).float()
    guided = scale != 1  # the others need no unconditional branch
    if not bool(guided.any()):
        return unet(z_t, timesteps, states).sample.float()
    null = null_states.expand_as(states)[guided]
    both = unet(torch.cat([z_t, z_t[guided]]), torch.cat([timesteps, timesteps[guided]]), torch.cat([states, null]))
    cond, uncond = both.sample.float().split([len(z_t), len(null)])
    offset = (scale[guided] - 1).view(-1, *[1] * (z_t.ndim - 1)) * (cond[guided] - uncond)
    return cond.index_add(0, guided.nonzero()[:, 0], offset)
