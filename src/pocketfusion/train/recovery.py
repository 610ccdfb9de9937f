"""`recover`: distils the base into its evolved UNet, stage by stage (BK-SDM, arXiv 2305.15798, section 3.2)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, folder_hash
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.recipe import Recipe, RecoverySettings
from pocketfusion.train.batch import Batch
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result
from pocketfusion.train.start import Start, identity, open_start, train_on
from pocketfusion.train.teacher import TeacherTask


class StageFeatures:
    """Collects what each stage of an elastic UNet gives, in the order of the call."""

    def __init__(self, unet: ElasticUNet):
        self.values: list[torch.Tensor] = []
        self.handles: list[RemovableHandle] = [
            stage.register_forward_hook(lambda module, inputs, output: self.values.append(output))
            for stage in (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
        ]

    def take(self) -> list[torch.Tensor]:
        """The features since the last `take`."""
        values, self.values = self.values, []
        return values


def feature_loss(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """Mean over stages and samples of the squared error relative to the teacher's mean square, scalar in fp32.

    BK-SDM sums the plain squared errors; ours are relative, because a stage's magnitude depends on the model (at
    emoji64 the stages differ a hundredfold) and would else decide which stage is learned. Relative for each sample,
    so that the loss is a mean over samples and a batch in parts trains as the whole does. Stages whose shapes differ
    (a dropped sampler) are left out.
    """
    pairs = [
        (s.float().flatten(1), t.float().flatten(1))
        for s, t in zip(student, teacher, strict=True)
        if s.shape == t.shape
    ]
    errors = [(s - t).square().mean(1) / t.square().mean(1).clamp(min=1e-8) for s, t in pairs]
    return torch.stack([error.mean() for error in errors]).mean()


class RecoveryTask(TeacherTask):
    """L = λ_task L_task + λ_out |ε_S − ε_T|² + λ_feat L_feat, the teacher on the same noised latents and captions."""

    def __init__(
        self, recipe: Recipe, settings: RecoverySettings, data: CaptionedImages, start: Start, base: ElasticUNet
    ):
        super().__init__(recipe, data, start.unet, start.vae, start.text, settings.train, settings.half_size_until)
        self.recovery, self.base = settings, base.eval().requires_grad_(False)
        self.features = (StageFeatures(start.unet), StageFeatures(base))
        self.teachers = (self.base,)

    def to(self, device: torch.device) -> None:
        """Moves the base too."""
        super().to(device)
        self.base.to(device)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Logs the three losses unweighted."""
        made = self.noised(batch)
        with torch.no_grad():
            wanted = self.base(made.z_t, made.timesteps, made.states).sample
        self.features[0].take()
        prediction = model(made.z_t, made.timesteps, made.states).sample
        task, mse = self.objective.loss(prediction, made.x, made.noise, made.timesteps.cpu())
        output = F.mse_loss(prediction.float(), wanted.float())
        features = feature_loss(self.features[0].take(), self.features[1].take())
        settings = self.recovery
        loss = settings.task_weight * task + settings.output_weight * output + settings.feature_weight * features
        return loss, {"mse": mse.item(), "output": output.item(), "features": features.item()}


def recover(
    recipe: Recipe,
    data: CaptionedImages,
    folder: Path,
    base: Path,
    stage: StageRun,
    cache: Path | None = None,
) -> Provenance:
    """Trains `folder`'s (evolved) UNet with `base`'s as its teacher and writes a model folder.

    Raises PocketfusionError as `train` and `open_start` do, and if the two do not share one autoencoder.
    """
    settings = recipe.recovery
    if settings is None:
        raise PocketfusionError(f"the recipe {recipe.name} has no section 'recovery': see recipes/emoji64.yaml")
    parents = {"student": folder_hash(folder), "base": folder_hash(base)}
    made_by = identity("recover", settings.model_dump(mode="json"), recipe, data, parents)
    if (finished := finished_result(stage, made_by)) is not None:
        return finished
    start, teacher = open_start(folder, recipe), open_start(base, recipe)
    if start.vae_hash != teacher.vae_hash:
        raise PocketfusionError(f"{folder} and {base} have different latents: the base must be what it came from")
    task = RecoveryTask(recipe, settings, data, start, teacher.unet)
    return train_on(stage, task, settings.train, made_by, start, cache)
