"""Recipes: typed, validated YAML naming the data, the networks and the settings of each stage."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as shorten
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer

from pocketfusion.bounded import check_numbers, read_yaml
from pocketfusion.errors import PocketfusionError


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        # a network's own settings are sizes: what is larger than any of its layers fills the memory
        return check_numbers(value, 1e5 if isinstance(value, dict) else 1e9)


class TrainSettings(_Settings):
    """The training loop's settings; a step is one optimiser update of `batch_size` samples over all processes.

    `optimizer` `adamw-8bit`: AdamW's moments in 8 bits (torchao). `teacher_weights`: of frozen UNets, learnt from.

    What changes no weight is no part of what a run or a result is known by. `held_out`: at most so many held-out
    samples are looked at every `preview_every` steps and at the end. `micro_batch`: at most so many samples at once in
    place of `gradient_accumulation`'s parts, or `auto`, found by trial. `gradient_checkpointing`: compute activations
    twice rather than keep them. `offload`: what waits in the CPU's memory. `log_with`: trackers of accelerate.
    """

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0, le=100_000)
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
    held_out: int = Field(default=512, gt=0, exclude=True)
    seed: int = 0
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    teacher_weights: Literal["fp32", "bf16"] = "fp32"
    micro_batch: Annotated[int, Field(gt=0)] | Literal["auto"] | None = Field(default=None, exclude=True)
    gradient_checkpointing: bool = Field(default=False, exclude=True)
    offload: tuple[Literal["ema", "teacher"], ...] = Field(default=(), exclude=True)
    log_with: tuple[str, ...] = Field(default=(), exclude=True)

    @model_serializer(mode="wrap")
    def _as_before(self, handler: Any) -> dict[str, Any]:
        """Without what came later and is at its default: older runs and results are known by settings without it."""
        values = handler(self)
        for name in ("optimizer", "teacher_weights"):
            if values.get(name) == type(self).model_fields[name].default:
                del values[name]
        return values


class DataSettings(_Settings):
    """Which pictures of the data folder are used. `scene_share`: share of composed scenes among training samples."""

    size: int = Field(default=64, ge=16, le=4096)
    scene_share: float = Field(default=0.15, ge=0, le=1)
    flip: bool = True


class PictureLossSettings(_Settings):
    """How a drawn picture is compared with the wanted one: weights of the terms of `train.autoencoder.PictureLoss`.

    `feature_start`: the share of training after which the feature distance counts.
    """

    mse_weight: float = Field(default=1.0, ge=0)
    l1_weight: float = Field(default=0.0, ge=0)
    gradient_weight: float = Field(default=0.0, ge=0)
    colour_weight: float = Field(default=0.0, ge=0)
    feature_weight: float = Field(default=0.0, ge=0)
    feature_start: float = Field(default=0.0, ge=0, lt=1)


class AutoencoderSettings(_Settings):
    """`config` goes to diffusers' AutoencoderKL unchanged; losses are means over pixels or latent elements.

    `crop_size`: train on random crops of that many pixels until `crop_until` of the steps, then on whole pictures.
    `whiten`: give every latent channel mean 0 and deviation 1 on the training pictures, inside the two 1x1
    convolutions beside the latents; else one `scaling_factor` does for all channels.
    `latent_colour_weight`: of the error of the colour that a linear map reads in each latent.
    """

    config: dict[str, Any]
    loss: PictureLossSettings = PictureLossSettings(l1_weight=0.1)
    kl_weight: float = Field(default=1e-4, ge=0)
    latent_colour_weight: float = Field(default=0.0, ge=0)
    crop_size: int | None = Field(default=None, ge=8)
    crop_until: float = Field(default=1.0, ge=0, le=1)
    whiten: bool = False
    train: TrainSettings


class TeacherSettings(_Settings):
    """`unet` and `scheduler` go to UNet2DConditionModel and DDIMScheduler unchanged.

    `min_snr_gamma`: γ of min-SNR weighting; None: the plain squared error of what is predicted.
    `half_size_until`: share of the steps that train on pictures of half the width and height, before the whole ones.
    """

    unet: dict[str, Any]
    scheduler: dict[str, Any]
    prompt_dropout: float = Field(default=0.1, ge=0, lt=1)
    min_snr_gamma: float | None = Field(default=None, gt=0)
    half_size_until: float = Field(default=0.0, ge=0, lt=1)
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
    """Distillation of a smaller UNet from its base (BK-SDM, eq. 1): weights of its three losses.

    `half_size_until`: as in `TeacherSettings`.
    """

    task_weight: float = Field(default=1.0, ge=0)
    output_weight: float = Field(default=1.0, ge=0)
    feature_weight: float = Field(default=1.0, ge=0)
    half_size_until: float = Field(default=0.0, ge=0, lt=1)
    train: TrainSettings


class StepDistillSettings(_Settings):
    """Step distillation (SnapFusion 4.2): `teacher_steps` guided DDIM steps into `steps`.

    `guidance_probability` p and `guidance_range` of L_cfg, `original_weight` γ of L_ori, as the paper names them.
    `original_share`: share of each batch that L_ori is computed on. `grid`: the sampler's timesteps, or real times.
    `guidance_normalised`: divide a guided sample's loss by w² + (w − 1)²; false is the paper's form.
    """

    steps: int = Field(default=8, gt=0)
    teacher_steps: int = Field(default=16, gt=0)
    guidance_probability: float = Field(default=0.1, ge=0, le=1)
    guidance_range: tuple[float, float] = (2.0, 14.0)
    guidance_normalised: bool = False
    original_weight: float = Field(default=0.2, ge=0)
    original_share: float = Field(default=1.0, gt=0, le=1)
    dynamic_scaling: bool = True
    grid: Literal["discrete", "continuous"] = "discrete"
    teacher_precision: Literal["fp32", "bf16"] = "fp32"
    guidance_scale: float | None = Field(default=None, ge=0)
    train: TrainSettings


class ConsistencySettings(_Settings):
    """Consistency distillation in `steps` phases, along DDIM steps of `teacher_steps` (a multiple).

    `guidance`: what the student's costs; None: as the student's own, or folded if that takes two calls. It is taught
    at scales of `guidance_range`, a folded one at `guidance_scale`; a new input for the scale is `embedding_dim` wide.
    `teacher_precision`: of both networks that make a target. `huber_c`: where the loss turns from quadratic to linear.
    """

    steps: int = Field(default=4, gt=0)
    teacher_steps: int = Field(default=32, gt=0)
    guidance: Literal["classifier-free", "embedded", "folded"] | None = None
    guidance_range: tuple[float, float] = (1.0, 8.0)
    guidance_scale: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    embedding_dim: int = Field(default=256, ge=4, le=100_000, multiple_of=2)
    loss: Literal["huber", "mse"] = "huber"
    huber_c: float = Field(default=0.00054, gt=0)
    teacher_precision: Literal["fp32", "bf16"] = "fp32"
    train: TrainSettings

    @field_validator("guidance_range")
    @classmethod
    def _rises(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= value[0] < value[1] < float("inf"):
            raise ValueError("give two ascending guidance scales from 1 up, such as 1 and 8")
        return value


class ToVSettings(_Settings):
    """Conversion of an ε-model to v: the prediction turns from one to the other over the first `turn_steps`."""

    turn_steps: int = Field(ge=0)
    train: TrainSettings


class GuidanceDistillSettings(_Settings):
    """Guidance distillation (Meng et al., arXiv 2210.03142): scales w ~ U(`scale_range`), one for each sample.

    `embedding_dim` is the width of the UNet's new input, diffusers' `time_cond_proj_dim`.
    """

    scale_range: tuple[float, float] = (1.0, 14.0)
    embedding_dim: int = Field(default=256, ge=4, le=100_000, multiple_of=2)
    train: TrainSettings

    @field_validator("scale_range")
    @classmethod
    def _ascends(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 1 <= value[0] < value[1] < float("inf"):
            raise ValueError("give two ascending guidance scales from 1 up, such as 1 and 14")
        return value


class DecoderDistillSettings(_Settings):
    """Distillation of a smaller decoder (SnapFusion 3.2, B.2) on `samples` latents drawn from training captions.

    `encoded_share` of each batch are training pictures instead, encoded, and themselves what is wanted.
    `num_inference_steps`: while drawing; None: the sampler's own, 50 (the paper's) if it states none.
    `guidance_scale`: each sample's is uniform between these two, within what an embedded one was distilled for.
    `precision`: the UNet's while drawing. `held_out`: latents drawn for validation. `cache_targets`: keep the
    teacher's pictures on disk beside the latents, rather than decode them in each step.
    """

    preset: Literal["half", "tiny"] = "half"
    loss: PictureLossSettings = PictureLossSettings()
    encoded_share: float = Field(default=0.0, ge=0, lt=1)
    samples: int = Field(default=8192, gt=0)
    held_out: int = Field(default=256, gt=0)
    num_inference_steps: int | None = Field(default=None, gt=0)
    guidance_scale: tuple[float, float] = (1.5, 7.0)
    precision: Literal["no", "bf16"] = "bf16"
    batch: int = Field(default=64, gt=0, le=100_000)
    cache_targets: bool = True
    train: TrainSettings

    @field_validator("guidance_scale")
    @classmethod
    def _does_not_descend(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] < float("inf"):
            raise ValueError("give the lowest and the highest guidance scale, such as 1.5 and 7")
        return value


class JudgeSettings(_Settings):
    """An image-text judge: `widths` of its image tower's stages and the shared embedding size."""

    widths: tuple[int, ...] = (32, 64, 128, 192)
    embed_dim: int = Field(default=128, gt=0, le=100_000)
    train: TrainSettings


class TextSettings(_Settings):
    """`source`: `minilm` for the packaged all-MiniLM-L6-v2, or a folder with a transformers text encoder.

    `cache_states`: keep every caption's states on disk (118 kB each with CLIP), or compute them in each step. It
    changes no result but by rounding, so it is no part of what a run or a result is known by.
    """

    source: str = "minilm"
    max_length: int = Field(default=32, ge=4, le=4096)
    cache_states: bool = Field(default=True, exclude=True)


class Recipe(_Settings):
    """One model from data to weights. `loss_judge` gives losses their features; `judge`, another network, scores.

    A recipe is without `SECTIONS` only where none of its stages needs them, as all that follow on a checkpoint.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    data: DataSettings = None  # type: ignore[assignment]  # `load_recipe`, `chain_of`
    text: TextSettings = TextSettings()
    autoencoder: AutoencoderSettings = None  # type: ignore[assignment]  # `load_recipe`, `chain_of`
    teacher: TeacherSettings = None  # type: ignore[assignment]  # `load_recipe`, `chain_of`
    judge: JudgeSettings = None  # type: ignore[assignment]  # `load_recipe`, `chain_of`
    loss_judge: JudgeSettings | None = None
    elastic: ElasticSettings | None = None
    recovery: RecoverySettings | None = None
    decoder: DecoderDistillSettings | None = None
    guidance: GuidanceDistillSettings | None = None
    to_v: ToVSettings | None = None
    step_distillation: StepDistillSettings | None = None
    consistency: ConsistencySettings | None = None
    stages: dict[str, dict[str, Any] | None] = {}  #: of `compress`, in their order; `compress.chain` reads them


def field_values(settings: BaseModel) -> dict[str, Any]:
    """Every field's value, also of those that `model_dump` leaves out; a section's in a dictionary of its own."""
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {name: field_values(one) if isinstance(one, BaseModel) else one for name, one in values.items()}


#: What a model is trained by.
SECTIONS = ("data", "autoencoder", "teacher", "judge")


def load_recipe(path: Path, whole: bool = True) -> Recipe:
    """Reads a recipe; raises PocketfusionError naming the file, the field and what is wrong with it.

    One that is to be `whole` has all of `SECTIONS`.
    """
    try:
        values = read_yaml(path)
    except OSError:
        raise PocketfusionError(f"there is no recipe at {path}: the project's own are in recipes/") from None
    except ValueError as error:
        raise PocketfusionError(f"{path} is no recipe: {error}: the project's own are in recipes/") from None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise PocketfusionError(f"{path}: {described(error, Recipe)}") from None
    for name in SECTIONS if whole else ():
        if getattr(recipe, name) is None:
            raise PocketfusionError(f"{path}: {name} is missing: add it")
    return recipe


def described(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing wrong with `model`'s values, for a reader: where, what, and the name that was probably meant."""
    first = error.errors(include_url=False)[0]
    loc = [str(part)[:200] for part in first["loc"]]
    if first["type"] == "missing":
        return f"{'.'.join(loc)} is missing: add it"
    if first["type"] != "extra_forbidden":
        what, got = first["msg"].removeprefix("Value error, "), shorten(first["input"])
        return f"{'.'.join(loc)}: {what} (got {got})" if loc else what
    for name in loc[:-1]:
        model = _section(model, name) or model
    where = f" in {'.'.join(loc[:-1])}" if loc[1:] else ""
    return f"there is no setting {loc[-1]!r}{where}: {nearest(loc[-1], list(model.model_fields))}"


def nearest(name: str, known: Sequence[str]) -> str:
    """Says which of `known` was probably meant by `name`, or which there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The settings' class of a field that holds one, or that and None."""
    field = model.model_fields.get(name)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
