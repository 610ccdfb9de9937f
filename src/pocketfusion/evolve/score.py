"""The quality that an action costs: CLIP score of a fixed validation set, drawn from fixed noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.evaluate.metrics import clip_score
from pocketfusion.evaluate.sets import choose_sets, members, picture_seed
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.guided import noise_batch, sample_latents
from pocketfusion.models.slim_autoencoder import to_uint8
from pocketfusion.train.teacher import fast_attention

VALIDATION = "val_combo"


class Judge(Protocol):
    """An image-text model: our judge, or `open_clip`'s."""

    def image_features(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, 3] → (features [N, F], unit embeddings [N, E])."""

    def text_embeddings(self, captions: Sequence[str]) -> np.ndarray:
        """Captions → unit embeddings [N, E]."""


@dataclass(frozen=True)
class Validation:
    """Captions with the noise seed of each one's picture."""

    captions: tuple[str, ...]
    seeds: tuple[int, ...]


def validation_set(data: CaptionedImages, samples: int, seed: int) -> Validation:
    """Up to `samples` captions of `val_combo`, chosen by hash as `evaluate` chooses; never of a test split.

    Raises PocketfusionError if the data has no such split or `samples` is below 2.
    """
    if VALIDATION not in members(data):
        raise PocketfusionError(
            f"{data.name} has no validation pictures: evolving scores on the split {VALIDATION}, never on test data "
            f"(it has {', '.join(data.splits)}); give at least two rows that split"
        )
    chosen = choose_sets(data, [VALIDATION], samples)[0]
    seeds = tuple(picture_seed(seed, data.rows[i]["id"]) for i in chosen.indices)
    return Validation(chosen.captions, seeds)


@dataclass(frozen=True)
class ScoreSettings:
    """DDIM steps and guidance of the validation pictures; pictures a batch; precision of the UNet's arithmetic."""

    num_inference_steps: int = 10
    guidance_scale: float = 4.0
    batch: int = 64
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise PocketfusionError(
                f"--steps {self.num_inference_steps} is below 1: give the number of steps, such as 10"
            )


class JudgeScorer:
    """CLIP score of each validation picture as a network draws it, by a judge (ours or `OpenClip`).

    Noise, prompt states and caption embeddings are made once; what differs between two scores is the network alone.
    `system` lends everything but the UNet: `vae`, `text`, `scheduler` as `evaluate.generate.ModelFolder` has them.
    """

    def __init__(self, system: Any, judge: Judge, validation: Validation, settings: ScoreSettings):
        self.vae, self.scheduler, self.judge, self.settings = system.vae, system.scheduler, judge, settings
        self.text_embeddings = judge.text_embeddings(list(validation.captions))
        self.seeds, batch = validation.seeds, settings.batch
        self.null = system.text.encode([""])[0]
        self.states = [
            system.text.encode(validation.captions[start : start + batch])[0]
            for start in range(0, len(validation.captions), batch)
        ]

    @torch.no_grad()
    def score(self, network: ElasticUNet) -> np.ndarray:
        """[N] scores in the validation set's order; the network is left in evaluation mode."""
        device = self.vae.device
        network.to(device).eval()
        fast_attention(network, device)
        shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)
        images, start = [], 0
        for states in self.states:
            noise = noise_batch(self.seeds[start : start + len(states)], shape).to(device)
            start += len(states)
            states = states.to(device)
            reduced = torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
            with reduced:
                latents = sample_latents(
                    network,
                    self.scheduler,
                    noise,
                    states,
                    self.null.to(device).expand_as(states),
                    num_inference_steps=self.settings.num_inference_steps,
                    guidance_scale=self.settings.guidance_scale,
                )
            images.append(to_uint8(self.vae.decode(latents / self.vae.config.scaling_factor).sample))
        return clip_score(self.judge.image_features(np.concatenate(images))[1], self.text_embeddings)
