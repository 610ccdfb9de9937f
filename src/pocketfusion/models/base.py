"""Model folders: stock diffusers components with everything a stock pipeline needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from pocketfusion.artefact import write_json
from pocketfusion.folder import COMPONENTS, PROVENANCE
from pocketfusion.models.elastic_unet import ElasticUNet, as_stock
from pocketfusion.models.licences import LicenceNote, write_licences
from pocketfusion.models.sampling import SAMPLING
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


def copy_with_unet(source: Path, out: Path, unet: ElasticUNet, dtype: torch.dtype = torch.float16) -> None:
    """Copies the model folder `source` into the existing folder `out` with `unet` in place of its own.

    The UNet's weights are saved in `dtype`. One of stock architecture is saved as a stock UNet2DConditionModel, so
    that the folder loads in stock diffusers; an evolved one loads there once `pocketfusion.models.elastic_unet` is
    imported. Provenance, model card and pictures are the source's own and are not copied.
    """
    own = shutil.ignore_patterns(PROVENANCE, "README.md", "*.png")
    for name in (*COMPONENTS[1:], "licences"):
        if (source / name).is_dir():
            # a provenance inside vae/ is the autoencoder's: it stays
            shutil.copytree(source / name, out / name, ignore=None if name == "vae" else own)
    if (source / SAMPLING).is_file():
        shutil.copyfile(source / SAMPLING, out / SAMPLING)
    saved = as_stock(unet)
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    index["unet"] = [saved.__class__.__module__ if saved is unet else "diffusers", saved.__class__.__name__]
    write_json(out / "model_index.json", index)
    before = saved.dtype
    saved.to(dtype).save_pretrained(out / "unet", safe_serialization=True)
    saved.to(before)


def write_scheduler(folder: Path, scheduler: DDIMScheduler) -> None:
    """Puts `scheduler` in the place of the model folder's own, whatever class that was."""
    shutil.rmtree(folder / "scheduler", ignore_errors=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler.__class__.__name__]
    write_json(folder / "model_index.json", index)
