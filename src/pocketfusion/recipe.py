"""Recipes: typed, validated YAML naming the data, the networks and the settings of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pocketfusion.errors import PocketfusionError


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainSettings(_Settings):
    """The training loop's settings; a step is one optimiser update of `batch_size` samples over all processes."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    gradient_accumulation: int = Field(default=1, gt=0)
    mixed_precision: Literal["no", "bf16"] = "bf16"
    compile: bool = False
    checkpoint_every: int = Field(default=500, gt=0)
    preview_every: int = Field(default=500, gt=0)
    seed: int = 0


class DataSettings(_Settings):
    """Which pictures of the data folder are used. `scene_share`: share of composed scenes among training samples."""

    size: int = Field(default=64, ge=16)
    scene_share: float = Field(default=0.15, ge=0, le=1)
    flip: bool = True


class AutoencoderSettings(_Settings):
    """`config` goes to diffusers' AutoencoderKL unchanged; losses are means over pixels or latent elements."""

    config: dict[str, Any]
    l1_weight: float = Field(default=0.1, ge=0)
    kl_weight: float = Field(default=1e-4, ge=0)
    train: TrainSettings


class TeacherSettings(_Settings):
    """`unet` and `scheduler` go to UNet2DConditionModel and DDIMScheduler unchanged."""

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    prompt_dropout: float = Field(default=0.1, ge=0, lt=1)
    min_snr_gamma: float | None = Field(default=5.0, gt=0)
    guidance_scale: float = 4.0
    num_inference_steps: int = Field(default=25, gt=0)
    train: TrainSettings


class ElasticSettings(_Settings):
    """Robust training (SnapFusion 3.1): each block is left out of a step with its kind's probability.

    The probabilities rise from 0 over the first `ramp_steps`.
    """

    attention_drop: float = Field(default=0.15, ge=0, lt=1)
    resnet_drop: float = Field(default=0.15, ge=0, lt=1)
    ramp_steps: int = Field(default=100, ge=0)
    train: TrainSettings


class RecoverySettings(_Settings):
    """Distillation of a smaller UNet from its base (BK-SDM, eq. 1): weights of its three losses."""

    task_weight: float = Field(default=1.0, ge=0)
    output_weight: float = Field(default=1.0, ge=0)
    feature_weight: float = Field(default=1.0, ge=0)
    train: TrainSettings


class JudgeSettings(_Settings):
    """The image-text judge: `widths` of its image tower's stages and the shared embedding size."""

    widths: tuple[int, ...] = (32, 64, 128, 192)
    embed_dim: int = Field(default=128, gt=0)
    train: TrainSettings


class TextSettings(_Settings):
    """`source`: `minilm` for the packaged all-MiniLM-L6-v2, or a folder with a transformers text encoder."""

    source: str = "minilm"
    max_length: int = Field(default=32, ge=4)


class Recipe(_Settings):
    """One model from data to weights."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    data: DataSettings
    text: TextSettings = TextSettings()
    autoencoder: AutoencoderSettings
    teacher: TeacherSettings
    judge: JudgeSettings
    elastic: ElasticSettings | None = None
    recovery: RecoverySettings | None = None


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe; raises PocketfusionError naming the file, the field and what is wrong with it."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise PocketfusionError(f"there is no recipe at {path}: the project's own are in recipes/") from None
    except yaml.YAMLError as error:
        raise PocketfusionError(f"{path} is not valid YAML ({str(error).splitlines()[0]})") from None
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the recipe"
        raise PocketfusionError(f"{path}: {where}: {first['msg']} (got {first['input']!r})") from None
