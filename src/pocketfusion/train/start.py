"""What training on from a model folder begins with: its networks, checked against the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import (
    ENCODER,
    Provenance,
    check_finite,
    check_folder,
    read_provenance,
    weights_hash,
)
from pocketfusion.locks import hold
from pocketfusion.models.elastic_unet import ElasticUNet, load_elastic
from pocketfusion.models.noise_schedule import read_ddim_scheduler
from pocketfusion.models.sampling import Sampling, write_sampling
from pocketfusion.models.slim_autoencoder import load_vae
from pocketfusion.models.text_encoder import TextEncoder, check_text_encoder, load_text_encoder
from pocketfusion.models.writing import copy_with_unet, write_scheduler
from pocketfusion.recipe import Recipe, TrainSettings
from pocketfusion.train.loop import TrainResult
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import run_stage
from pocketfusion.train.teacher import TeacherTask, check_shapes, fast_attention


@dataclass(frozen=True)
class Start:
    """A model folder opened for training: its UNet (elastic), its frozen autoencoder, the recipe's text encoder."""

    folder: Path
    unet: ElasticUNet
    vae: AutoencoderKL
    text: TextEncoder
    vae_hash: str  #: of its encoder: what the latents depend on
    device: torch.device


def open_start(folder: Path, recipe: Recipe, prediction_type: str | None = None) -> Start:
    """Opens a folder whose prediction type is `prediction_type` (default: the recipe's).

    Raises PocketfusionError if it is not sound, not SD-family, or the recipe was made for another model.
    """
    check_folder(folder)
    unet = load_elastic(folder)
    check_finite(unet, str(folder / "unet"))
    vae = load_vae(folder / "vae")
    text = load_text_encoder(recipe.text)
    check_text_encoder(recipe.text, text, folder)
    check_shapes(unet.config, recipe, vae, text, where=str(folder / "unet"))
    scheduler = read_ddim_scheduler(folder).config
    wanted = recipe.teacher.scheduler | ({"prediction_type": prediction_type} if prediction_type else {})
    for name, value in wanted.items():
        if scheduler[name] != value:
            raise PocketfusionError(
                f"the recipe's teacher.scheduler.{name} is {value!r} but {folder} was trained with {scheduler[name]!r}"
                ": use the recipe of that model"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast_attention(unet, device)
    return Start(folder, unet, vae, text, weights_hash(folder / "vae", ENCODER), device)


def train_on(
    stage: StageRun,
    task: TeacherTask,
    settings: TrainSettings,
    made_by: dict[str, Any],
    start: Start,
    cache: Path | None,
    sampling: Sampling | None = None,
    scheduler: DDIMScheduler | None = None,
) -> Provenance:
    """Fills the caches, trains, and writes `start`'s folder again with the trained UNet.

    `sampling` and `scheduler`: how the result is sampled, if not as `start` is.
    """
    hold(stage.run)  # the caches lie in it
    task.prepare(cache or stage.run / "cache", start.vae_hash, start.text.fingerprint, start.device)

    def write(out: Path, result: TrainResult) -> dict[str, Any]:
        copy_with_unet(start.folder, out, start.unet)
        if sampling is not None:
            write_sampling(out, sampling)
        if scheduler is not None:
            write_scheduler(out, scheduler)
        task.preview(start.unet).save(out / "preview.png")
        return {}

    before = read_provenance(start.folder)
    return run_stage(stage, task, settings, made_by, write, load_elastic, before.samples_seen if before else 0)


def identity(
    stage: str, settings: dict[str, Any], recipe: Recipe, data: CaptionedImages, parents: dict[str, str]
) -> dict[str, Any]:
    """What a stage's result depends on: its own settings, those of the base's objective, data and parents."""
    shared = {
        "data": recipe.data.model_dump(mode="json"),
        "text": recipe.text.model_dump(),
        "objective": recipe.teacher.model_dump(mode="json", include={"prompt_dropout", "min_snr_gamma"}),
    }
    return {
        "stage": stage,
        "settings": settings | shared,
        "parents": parents,
        "data": {"name": data.name, "fingerprint": data.fingerprint},
    }
