"""What a guidance distillation learns: which scales, on which timesteps, and how its result is meant to be sampled."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.sampling import Sampling
from pocketfusion.recipe import GuidanceDistillSettings, Recipe, field_values


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
