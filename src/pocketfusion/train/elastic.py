"""`train-elastic`: SnapFusion's robust training, after which the loss of single blocks can be measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, folder_hash
from pocketfusion.models.elastic.architecture import Architecture
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.recipe import ElasticSettings, Recipe
from pocketfusion.train.batch import Batch
from pocketfusion.train.loop import train
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result
from pocketfusion.train.start import Start, identity, open_start, train_on
from pocketfusion.train.teacher import TeacherTask, fast_attention


def draw_skipped(architecture: Architecture, settings: ElasticSettings, u: np.ndarray, step: int) -> frozenset[str]:
    """Names of the blocks that step `step` (from 0) leaves out; `u` [blocks] uniform in [0, 1).

    SnapFusion section 3.1: ε_θ = Π {p(CA, I), p(ResNet, I)}. Its probabilities and schedule are not published.
    """
    ramp = min(1.0, (step + 1) / settings.ramp_steps) if settings.ramp_steps else 1.0
    return random_blocks(architecture, settings.attention_drop * ramp, settings.resnet_drop * ramp, u)


def random_blocks(
    architecture: Architecture, attention_drop: float, resnet_drop: float, u: np.ndarray | None = None
) -> frozenset[str]:
    """Names of blocks, each with its kind's probability; `u` [blocks] uniform in [0, 1), drawn by numpy if None."""
    blocks = [name for name, _ in architecture.blocks()]
    chance = {"attentions": attention_drop, "resnets": resnet_drop}
    drawn = np.random.default_rng().random(len(blocks)) if u is None else u
    return frozenset(str(name) for name, x in zip(blocks, drawn, strict=True) if x < chance[name.kind])


class ElasticTask(TeacherTask):
    """The base's own objective on a network that leaves out random blocks, the same ones for a step's whole batch."""

    unused_parameters = True
    model: ElasticUNet

    def __init__(self, recipe: Recipe, settings: ElasticSettings, data: CaptionedImages, start: Start):
        super().__init__(recipe, data, start.unet, start.vae, start.text, settings.train)
        self.elastic = settings

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """See `TeacherTask.loss`; logs the share of blocks left out too."""
        architecture = self.model.architecture
        count = len(architecture.names())
        skipped = draw_skipped(architecture, self.elastic, batch.shared(count).numpy(), batch.step)
        self.model.skipped = skipped
        loss, logged = super().loss(model, batch)
        self.model.skipped = frozenset()
        return loss, {**logged, "skipped": len(skipped) / max(1, count)}


def elastic_settings(recipe: Recipe) -> ElasticSettings:
    """The recipe's; raises PocketfusionError if it has none."""
    if recipe.elastic is None:
        raise PocketfusionError(f"the recipe {recipe.name} has no section 'elastic': see recipes/emoji64.yaml")
    return recipe.elastic


def train_elastic(
    recipe: Recipe, data: CaptionedImages, folder: Path, stage: StageRun, cache: Path | None = None
) -> Provenance:
    """Trains `folder`'s UNet with elastic depth and writes a model folder of the same architecture.

    Raises PocketfusionError as `train` and `open_start` do.
    """
    settings = elastic_settings(recipe)
    made_by = identity("train-elastic", settings.model_dump(mode="json"), recipe, data, {"base": folder_hash(folder)})
    if (finished := finished_result(stage, made_by)) is not None:
        return finished
    start = open_start(folder, recipe)
    task = ElasticTask(recipe, settings, data, start)
    return train_on(stage, task, settings.train, made_by, start, cache)


class RobustTrainer:
    """Robust training between the rounds of `evolve`: the same task on whatever the UNet has become."""

    def __init__(self, recipe: Recipe, data: CaptionedImages, folder: Path, cache: Path):
        settings = elastic_settings(recipe)
        # blocks are left out already when a round begins: no second ramp
        self.settings = settings.model_copy(update={"ramp_steps": 0})
        self.start = open_start(folder, recipe)
        self.task = ElasticTask(recipe, self.settings, data, self.start)
        self.task.prepare(cache, self.start.vae_hash, self.start.text.fingerprint, self.start.device)

    def train(self, unet: ElasticUNet, run: Path, steps: int, seed: int) -> ElasticUNet:
        """Trains `unet` in place for `steps` from the newest checkpoint in `run`, and returns it with EMA weights."""
        fast_attention(unet, self.start.device)
        self.task.model = unet
        settings = self.settings.train.model_copy(
            update={"steps": steps, "seed": seed, "warmup_steps": min(self.settings.train.warmup_steps, steps // 10)}
        )
        self.task.plan = self.task.plan.reseeded(seed)
        fingerprint = {
            "stage": "evolve",
            "settings": settings.model_dump(mode="json"),
            "architecture": unet.architecture.model_dump(mode="json"),
        }
        train(self.task, settings, run, fingerprint=fingerprint)
        return unet
