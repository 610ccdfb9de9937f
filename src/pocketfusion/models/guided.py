"""One guided prediction, whatever guidance costs the UNet: two rows a sample, an embedded scale, or a folded one.

And batched DDIM sampling by it with diffusers' scheduler: for previews, evaluation and distillation data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.sampling import Guidance
from pocketfusion.models.slim_autoencoder import to_uint8
from pocketfusion.models.text_encoder import TextEncoder
from pocketfusion.runtime.denoise import seeded_noise


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
    """ṽ of `guided_predictor` for z_t [B, C, h, w] at timesteps [B] or scalar."""
    return guided_predictor(unet, states, null_states, guidance_scale, guidance)(z_t, timesteps)


def guided_predictor(
    unet: UNet2DConditionModel,
    states: torch.Tensor,
    null_states: torch.Tensor,
    guidance_scale: torch.Tensor,
    guidance: Guidance = "classifier-free",
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(z_t, timesteps) → ṽ = w v(c) − (w − 1) v(∅), fp32, with the gradient through both branches (SnapFusion).

    states [B, T, D], null_states [T, D] or [B, T, D], guidance_scale [B]. One call of the UNet, whatever the guidance:
    the unconditional branch of the samples with w > 1 is a part of the same batch and sees the same z_t. Every call
    passes one and the same tensor of states, so that `remembered_text` knows it again.
    """
    scale = guidance_scale.to(states.device).float()
    # the others need no unconditional branch: at and below 1 there is no guidance, as in diffusers
    guided = scale > 1 if guidance == "classifier-free" else torch.zeros_like(scale, dtype=torch.bool)
    if bool(guided.any()):
        null = null_states.expand_as(states)[guided]
        states = torch.cat([states, null])

    def predict(z_t: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        timesteps = torch.as_tensor(timesteps, device=z_t.device).expand(len(z_t))
        if guidance == "embedded":
            config = getattr(unet, "module", unet).config  # a distributed wrapper has none of its own
            condition = guidance_embedding(scale, config.time_cond_proj_dim)
            return unet(z_t, timesteps, states, timestep_cond=condition.to(z_t.dtype)).sample.float()
        if len(states) == len(z_t):
            return unet(z_t, timesteps, states).sample.float()
        both = unet(torch.cat([z_t, z_t[guided]]), torch.cat([timesteps, timesteps[guided]]), states).sample.float()
        cond, uncond = both.split([len(z_t), len(states) - len(z_t)])
        offset = (scale[guided] - 1).view(-1, *[1] * (z_t.ndim - 1)) * (cond[guided] - uncond)
        return cond.index_add(0, guided.nonzero()[:, 0], offset)

    return predict


class Remembered(nn.Module):
    """A layer that answers the same tensor again without computing it again."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self._input: torch.Tensor | None = None
        self._output = torch.empty(0)

    def forward(self, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """`layer(x)`; [B, T, D] → [B, T, C]."""
        if x is not self._input:
            self._input, self._output = x, self.layer(x, *arguments)
        return self._output


@contextmanager
def remembered_text(unet: nn.Module) -> Iterator[None]:
    """While it lasts, every cross-attention of `unet` keeps the keys and values of the last text states.

    A batch's states are one tensor through all sampling steps, so the keys and values that are made of them are too:
    computing them once is exact, and at small latents they are a large part of a step. Not for training.
    """
    layers = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    for layer in layers:
        layer.to_k, layer.to_v = Remembered(layer.to_k), Remembered(layer.to_v)
    try:
        yield
    finally:
        for layer in layers:
            layer.to_k, layer.to_v = layer.to_k.layer, layer.to_v.layer


def noise_batch(seeds: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """The runtime's noise of each seed for latents of `shape` (C, h, w): [B, C, h, w]."""
    channels, height, width = shape
    draws = [seeded_noise(seed, height, width, channels) for seed in seeds]
    return torch.from_numpy(np.stack(draws)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def sample_latents(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    noise: torch.Tensor,
    prompt_embeds: torch.Tensor,
    negative_prompt_embeds: torch.Tensor,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    guidance: Guidance = "classifier-free",
) -> torch.Tensor:
    """DDIM (η = 0), guided: noise [B, C, h, w], prompt states [B, T, D] → latents [B, C, h, w].

    guidance_scale 1 or less runs the conditional branch alone.
    """
    scheduler.set_timesteps(num_inference_steps)
    scale = torch.full((len(noise),), guidance_scale, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    predict = guided_predictor(unet, prompt_embeds, negative_prompt_embeds, scale, guidance)
    with remembered_text(unet):
        # for some counts (61 is one) diffusers' rounding adds a step at timestep -1
        for t in scheduler.timesteps[:num_inference_steps]:
            latents = scheduler.step(predict(latents, t), t, latents).prev_sample
    return latents


@torch.no_grad()
def sample_images(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text: TextEncoder,
    scheduler: DDIMScheduler,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_inference_steps: int = 25,
    guidance_scale: float = 4.0,
    guidance: Guidance = "classifier-free",
    batch: int = 64,
    side: int | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Prompts and seeds → uint8 [N, H, W, 3]; `on_batch` hears how many are done.

    `side`: of the latents; default: what the UNet is for.
    """
    side = side or unet.config.sample_size
    shape = (unet.config.in_channels, side, side)
    empty, images = text.encode([""])[0], []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        states = text.encode(part)[0].to(unet.device)
        latents = sample_latents(
            unet,
            scheduler,
            noise_batch(seeds[start : start + batch], shape).to(unet.device),
            states,
            empty.to(unet.device).expand_as(states),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance=guidance,
        )
        images.append(to_uint8(vae.decode(latents / vae.config.scaling_factor).sample))
        if on_batch:
            on_batch(start + len(part))
    return np.concatenate(images)
