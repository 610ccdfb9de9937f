"""Batched DDIM sampling in torch with diffusers' scheduler: for previews, evaluation and distillation data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from pocketfusion.models.guidance import guided_predictor, remembered_text
from pocketfusion.models.sampling import Guidance
from pocketfusion.models.text_encoder import TextEncoder
from pocketfusion.runtime.denoise import seeded_noise
from pocketfusion.train.autoencoder import to_uint8


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
