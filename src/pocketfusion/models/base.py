"""The base model folder: stock diffusers components with everything a stock pipeline needs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from pocketfusion.folder import PROVENANCE
from pocketfusion.models.licences import LicenceNote, write_licences
from pocketfusion.models.text_encoder import TextEncoder


def write_base_folder(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text: TextEncoder,
    scheduler: DDIMScheduler,
    autoencoder: Path,
    licences: Sequence[LicenceNote],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` loads: weights in `dtype`, and licences.

    `vae/` keeps the provenance of `autoencoder`, so that it can be trained on from there.
    """
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    modules = (unet, vae, text.encoder)
    for module in modules:
        module.to(dtype)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for module in modules:
        module.to(torch.float32)
    if (autoencoder / PROVENANCE).is_file():
        shutil.copyfile(autoencoder / PROVENANCE, folder / "vae" / PROVENANCE)
    write_licences(folder, [*([text.licence] if text.licence else []), *licences])
