"""`to-v`: fine-tunes an ε-model to v-prediction from its exact algebraic start (SnapFusion section 4.1)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.distill.ddim import NoiseSchedule, add_noise
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, folder_hash
from pocketfusion.recipe import Recipe, ToVSettings
from pocketfusion.train.batch import Batch
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result
from pocketfusion.train.start import Start, identity, open_start, train_on
from pocketfusion.train.teacher import TeacherTask


def turned_target(x: torch.Tensor, noise: torch.Tensor, phi: torch.Tensor, share: float) -> torch.Tensor:
    """What the network predicts when a `share` of the turn from ε to v is done, same shape as x; phi [B].

    x and ε are the axes of a plane in which v lies at φ from ε: cos(share φ) ε − sin(share φ) x is ε at 0 and v at 1.
    """
    turned = (share * phi).float().view(-1, *[1] * (x.ndim - 1)).to(x.device)
    return turned.cos() * noise - turned.sin() * x


class ToVTask(TeacherTask):
    """The prediction turns from ε to v with the steps; its mean squared error is the loss throughout.

    No stock UNet is v = (ε̂ − σ z)/α of another, so its weights cannot be converted at once. But the prediction
    u = cos(s φ) ε − sin(s φ) x determines v at every s, by v = (u − sin((1 − s) φ) z) / cos((1 − s) φ): the start,
    s = 0, is the ε-model itself with exactly that conversion, and the end, s = 1, is v.
    """

    def __init__(self, recipe: Recipe, settings: ToVSettings, data: CaptionedImages, start: Start):
        super().__init__(recipe, data, start.unet, start.vae, start.text, settings.train)
        self.turn, self.schedule = settings, NoiseSchedule(self.scheduler)

    def share(self, step: int) -> float:
        """How much of the turn is done at a step (from 0)."""
        return min(1.0, step / self.turn.turn_steps) if self.turn.turn_steps else 1.0

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """|u_θ(z_t) − u|² with the recipe's min-SNR weights off: SnapFusion's L_ori once the turn is done."""
        x, states = self.clean(batch)
        times = batch.randint(self.scheduler.config.num_train_timesteps)
        noise = batch.randn(*x.shape[1:])
        z_t = add_noise(x, noise, self.schedule.at(times, x))
        target = turned_target(x, noise, self.schedule.angle(times), self.share(batch.step)).to(self.device)
        prediction = model(z_t.to(self.device), times.to(self.device), states.to(self.device)).sample
        loss = (prediction.float() - target).square().mean()
        return loss, {"share": self.share(batch.step)}


def to_v(
    recipe: Recipe,
    data: CaptionedImages,
    folder: Path,
    stage: StageRun,
    cache: Path | None = None,
) -> Provenance:
    """Fine-tunes `folder`, an ε-model, and writes it as a v-model; `recipe` is the v-model's.

    Raises PocketfusionError as `train` and `open_start` do, if the folder already predicts v, or if the recipe's
    prediction type is not v_prediction.
    """
    settings = recipe.to_v
    if settings is None:
        raise PocketfusionError(f"the recipe {recipe.name} has no section 'to_v': see recipes/sd15.yaml")
    if recipe.teacher.scheduler.get("prediction_type") != "v_prediction":
        raise PocketfusionError(
            f"the recipe {recipe.name} has prediction_type {recipe.teacher.scheduler.get('prediction_type')!r}: "
            "give the recipe of the v-model, with v_prediction"
        )
    if settings.turn_steps >= settings.train.steps:
        raise PocketfusionError(
            f"to_v.turn_steps {settings.turn_steps} leaves no step of {settings.train.steps} for v itself: lower it"
        )
    made_by = identity("to-v", settings.model_dump(mode="json"), recipe, data, {"model": folder_hash(folder)})
    if (finished := finished_result(stage, made_by)) is not None:
        return finished
    start = open_start(folder, recipe, prediction_type="epsilon")
    task = ToVTask(recipe, settings, data, start)
    return train_on(stage, task, settings.train, made_by, start, cache, scheduler=task.scheduler)
