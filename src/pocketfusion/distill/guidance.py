"""`distill-guidance`: a student whose one call is the teacher's guided prediction, for any scale or for one.

Meng et al., arXiv 2210.03142, section 3.1, which *Squeezing Large-Scale Diffusion Models for Mobile* (arXiv
2307.01193) does first of its two distillations: half the network calls of classifier-free guidance.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from pydantic import ValidationError
from torch import nn

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.distill.compatible import check_teacher
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import Provenance, folder_hash
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.models.guided import guidance_embedding, guidance_of, guided_prediction
from pocketfusion.models.noise_schedule import read_ddim_scheduler
from pocketfusion.models.sampling import Guidance, Sampling, read_sampling
from pocketfusion.recipe import GuidanceDistillSettings, Recipe, field_values
from pocketfusion.train.batch import Batch, shared
from pocketfusion.train.place import StageRun
from pocketfusion.train.stage import finished_result
from pocketfusion.train.start import Start, identity, open_start, train_on
from pocketfusion.train.teacher import TeacherTask, fast_attention

UNet = TypeVar("UNet", bound=UNet2DConditionModel)
_NEW = "time_embedding.cond_proj.weight"


def with_guidance_input(unet: UNet, dim: int = 256) -> UNet:
    """A copy of `unet` that takes `timestep_cond` [B, dim] (diffusers' `time_cond_proj_dim`), whatever its class.

    The new weight is zero, so the copy predicts what `unet` does, bit for bit, at every guidance scale.
    Raises PocketfusionError if `unet` has such an input already.
    """
    if unet.config.time_cond_proj_dim is not None:
        raise PocketfusionError("the UNet takes a guidance scale already: begin from one without")
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        new = type(unet)(**{**config, "time_cond_proj_dim": dim})
    weights = {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}
    like = weights["time_embedding.linear_1.weight"]
    weights[_NEW] = torch.zeros(like.shape[1], dim, dtype=like.dtype, device=like.device)
    new.load_state_dict(weights, assign=True)
    return new.train(unet.training)


class GuidanceTask(TeacherTask):
    """|v_S(z_t, t, c, w) − ṽ_T|² with ṽ_T = w v_T(c) − (w − 1) v_T(∅) and w ~ U(range); in ε for ε-models.

    Where captions are dropped both branches are v_T(∅), so the student learns the empty prompt too. With
    `sampling.guidance` `folded` the scale is `sampling`'s for all samples and the student takes none.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: GuidanceDistillSettings,
        data: CaptionedImages,
        start: Start,
        teacher: ElasticUNet,
        teacher_guidance: Guidance,
        sampling: Sampling,
        timesteps: torch.Tensor | None = None,
    ):
        """`timesteps` [N] are those that are trained; all of them if None."""
        super().__init__(recipe, data, start.unet, start.vae, start.text, settings.train)
        self.teacher, self.teacher_guidance = teacher.eval().requires_grad_(False), teacher_guidance
        self.teachers = (self.teacher,)
        self.sampling, self.range = sampling, settings.scale_range
        table = self.scheduler.config.num_train_timesteps
        self.timesteps = torch.arange(table) if timesteps is None else timesteps
        self._held_out: dict[int, tuple[torch.Tensor, ...]] = {}  #: by their first row

    def to(self, device: torch.device) -> None:
        """Moves the teacher too."""
        super().to(device)
        self.teacher.to(device)

    def scales(self, u: torch.Tensor) -> torch.Tensor:
        """Guidance scales [B] for `u` [B] uniform in [0, 1)."""
        if self.sampling.guidance == "folded":
            return torch.full_like(u, self.sampling.guidance_scale)
        low, high = self.range
        return low + (high - low) * u

    def predict(
        self, model: nn.Module, z_t: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        """The student's one call, fp32 (`model` may be wrapped for several processes, so its config is not asked)."""
        if self.sampling.guidance == "folded":
            return model(z_t, timesteps, states).sample.float()
        condition = guidance_embedding(scales, self.model.config.time_cond_proj_dim)
        return model(z_t, timesteps, states, timestep_cond=condition).sample.float()

    @torch.no_grad()
    def wanted(
        self, z_t: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, scales: torch.Tensor
    ) -> torch.Tensor:
        """The teacher's guided prediction, fp32."""
        null = self.null.to(z_t.device)
        return guided_prediction(self.teacher, z_t, timesteps, states, null, scales, self.teacher_guidance)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error against the guided prediction; logs it relative to that prediction's mean square."""
        x, states = self.clean(batch)
        timesteps = self.timesteps[batch.randint(len(self.timesteps))]
        z_t = self.objective.add_noise(x, batch.randn(*x.shape[1:]), timesteps)
        made = [value.to(self.device) for value in (z_t, timesteps, states, self.scales(batch.rand()))]
        target = self.wanted(*made)
        loss = (self.predict(model, *made) - target).square().mean()
        return loss, {"relative": (loss.detach() / target.square().mean()).item()}

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """On the held-out pairs, at fixed noise, evenly spread timesteps and scales.

        `val_guided_mse`: against the teacher's guided prediction. `val_guidance_left`: that error over the mean square
        of what guidance adds, ṽ_T − v_T(c); 1 for a student that is the teacher without guidance, 0 for a perfect one.
        """

        def errors(rows: torch.Tensor) -> torch.Tensor:
            first = int(rows[0])
            if first not in self._held_out:
                self._held_out[first] = self._hold_out(rows)
            *made, target, plain = self._held_out[first]
            return torch.stack([x.square().mean() for x in (self.predict(model, *made) - target, target - plain)])

        error, added = shared(len(self.held_out), 2, errors).mean(0).tolist()
        return {"val_guided_mse": error, "val_guidance_left": error / added if added else 0.0}

    def _hold_out(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Held-out z_t, timesteps, states, scales, ṽ_T, v_T(c); made once, as the teacher is frozen."""
        x, noise, states = self.held_out_pairs()
        spread = torch.arange(len(x)) / max(1, len(x) - 1)
        timesteps = self.timesteps[(spread * (len(self.timesteps) - 1)).round().long()]
        scales = self.scales(torch.arange(len(x)) * 0.618034 % 1)  # golden steps: spread anew at every timestep
        z_t = self.objective.add_noise(x, noise, timesteps)
        z, t, c, w = (value[rows].to(self.device) for value in (z_t, timesteps, states, scales))
        return z, t, c, w, self.wanted(z, t, c, w), self.wanted(z, t, c, torch.ones_like(w))


def distill_guidance(
    recipe: Recipe,
    data: CaptionedImages,
    folder: Path,
    stage: StageRun,
    teacher: Path | None = None,
    fixed: float | None = None,
    scale_range: tuple[float, float] | None = None,
    steps: int | None = None,
    cache: Path | None = None,
) -> Provenance:
    """Trains `folder`'s UNet to predict in one call what `teacher` (default: `folder`) predicts guided.

    The scale is the UNet's input, or `fixed` for all. `steps`: the sampling grid on whose timesteps it is trained (see
    `plan_sampling`). Raises PocketfusionError as `train`, `open_start` and `check_teacher` do, and if the two are not
    a student and a teacher of guidance.
    """
    settings = guidance_settings(recipe, scale_range)
    teacher = teacher or folder
    check_teacher(folder, teacher)
    scheduler = read_ddim_scheduler(teacher)
    sampling, timesteps = plan_sampling(recipe, settings, scheduler, read_sampling(teacher), fixed, steps)
    grid = None if timesteps is None else timesteps.tolist()
    made_by = identity(
        "distill-guidance",
        settings.model_dump(mode="json") | {"sampling": sampling.model_dump(mode="json"), "grid": grid},
        recipe,
        data,
        {"student": folder_hash(folder), "teacher": folder_hash(teacher)},
    )
    if (finished := finished_result(stage, made_by)) is not None:
        return finished
    start, guide = open_start(folder, recipe), open_start(teacher, recipe)
    own = _guidance(folder, start.unet)
    if own != "classifier-free":
        raise PocketfusionError(
            f"{folder} has {own} guidance already: begin from a folder with classifier-free guidance"
        )
    teacher_guidance = _guidance(teacher, guide.unet)
    if teacher_guidance == "folded":
        raise PocketfusionError(f"{teacher} has one guidance scale folded in: choose a teacher that can be guided")
    if fixed is None:
        start = replace(start, unet=with_guidance_input(start.unet, settings.embedding_dim))
        fast_attention(start.unet, start.device)
    task = GuidanceTask(recipe, settings, data, start, guide.unet, teacher_guidance, sampling, timesteps)
    return train_on(stage, task, settings.train, made_by, start, cache, sampling)


def _guidance(folder: Path, unet: Any) -> Guidance:
    stated = read_sampling(folder)
    return guidance_of(unet, stated.guidance if stated else None)


def guidance_settings(recipe: Recipe, scale_range: tuple[float, float] | None = None) -> GuidanceDistillSettings:
    """The recipe's, with `scale_range` in place of its own; raises PocketfusionError if it has none or is no range."""
    if recipe.guidance is None:
        raise PocketfusionError(f"the recipe {recipe.name} has no section 'guidance': see recipes/emoji64.yaml")
    if scale_range is None:
        return recipe.guidance
    try:
        return GuidanceDistillSettings(**{**field_values(recipe.guidance), "scale_range": scale_range})
    except ValidationError:
        raise PocketfusionError(
            f"the guidance range is {scale_range[0]:g} to {scale_range[1]:g}: give two ascending scales from 1 up, "
            "such as 1,14"
        ) from None


def grid_timesteps(scheduler: DDIMScheduler, num_inference_steps: int) -> torch.Tensor:
    """The timesteps that sampling in so many steps visits, [N] int64; raises PocketfusionError if there are none."""
    scheduler = DDIMScheduler.from_config(scheduler.config)
    table = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= table:
        raise PocketfusionError(f"--steps is {num_inference_steps}: choose 1 to {table}")
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps
    if len(timesteps.unique()) != num_inference_steps or timesteps.min() < 0 or timesteps.max() >= table:
        raise PocketfusionError(
            f"--steps is {num_inference_steps}, for which the scheduler's {scheduler.config.timestep_spacing} spacing "
            f"has no grid: choose a divisor of its {table} timesteps"
        )
    return timesteps


def plan_sampling(
    recipe: Recipe,
    settings: GuidanceDistillSettings,
    scheduler: DDIMScheduler,
    stated: Sampling | None,
    fixed: float | None,
    steps: int | None,
) -> tuple[Sampling, torch.Tensor | None]:
    """How the student is meant to be sampled, and the timesteps [N] that it is trained on (None: all of them).

    `scheduler` and `stated` are the teacher's; the steps that its `sampling.json` states are the grid unless `steps`
    says otherwise, and as many steps as the table has timesteps mean all of them. Raises PocketfusionError for a scale
    or a grid that cannot be.
    """
    if fixed is not None and not 1 < fixed < float("inf"):
        raise PocketfusionError(f"--fixed is {fixed:g}: choose a guidance scale above 1, which guides nothing")
    table = scheduler.config.num_train_timesteps
    grid = steps if steps is not None else stated.num_inference_steps if stated else None
    timesteps = grid_timesteps(scheduler, grid) if grid is not None and grid != table else None
    if stated and timesteps is not None and stated.num_inference_steps % len(timesteps):
        raise PocketfusionError(
            f"--steps is {grid} but the teacher is sampled in {stated.num_inference_steps} steps: choose a divisor of "
            "those, whose timesteps it knows"
        )
    given = stated or Sampling(
        num_inference_steps=recipe.teacher.num_inference_steps, guidance_scale=recipe.teacher.guidance_scale
    )
    drawn = given.num_inference_steps if timesteps is None else len(timesteps)
    if fixed is not None:
        return Sampling(num_inference_steps=drawn, guidance_scale=fixed, guidance="folded"), timesteps
    low, high = settings.scale_range
    scale = min(max(given.guidance_scale, low), high)
    sampling = Sampling(
        num_inference_steps=drawn, guidance_scale=scale, guidance="embedded", guidance_range=(low, high)
    )
    return sampling, timesteps
