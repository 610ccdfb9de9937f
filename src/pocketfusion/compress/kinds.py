"""The kinds of stage: what each makes, what it takes from which others, and which scores a gate may ask of it.

And the options of those that have no section of the recipe, as its `stages` give them; names as their command's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pocketfusion.mobile.devices import DEVICES, DeviceName
from pocketfusion.recipe import TeacherSettings

Form = Literal["float32", "float16", "int8", "int8-dynamic", "int4-dynamic"]


class Options(BaseModel):
    """None, for the stages whose section of the recipe says everything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def names(cls) -> list[str]:
        """As a recipe has them."""
        return [field.alias or name for name, field in cls.model_fields.items()]


class DataOptions(Options):
    """Which pictures are made, at the recipe's size: emoji from packages, or shapes that are drawn here.

    `skip_bad`: of pictures that are there already, leave out those that cannot be read.
    """

    source: Literal["emoji", "shapes"] = "emoji"
    style: tuple[str, ...] = ()
    scenes: int = Field(default=3000, ge=0)
    variants: int = Field(default=0, ge=0)
    skin_tones: bool = False
    seed: int = 0
    skip_bad: bool = False


class ProfileOptions(Options):
    """`pocketfusion profile`. `architectures`: how many the predictions are checked against."""

    backend: Literal["litert-cpu", "litert-gpu", "torch"] = "litert-cpu"
    weights: str = "float32"
    batch: tuple[int, ...] = (2,)
    runs: int = Field(default=30, gt=0)
    threads: int | None = Field(default=None, gt=0)
    architectures: int = Field(default=0, ge=0)
    base_only: bool = False


class EvolveOptions(Options):
    """`pocketfusion evolve`; one of the two budgets."""

    budget_ms: float | None = Field(default=None, gt=0)
    budget_ratio: float | None = Field(default=None, gt=0)
    rounds: int = Field(default=10, gt=0)
    group: int = Field(default=4, gt=0)
    actions: tuple[str, ...] = ("remove", "self-attention", "feed-forward", "drop", "duplicate")
    samples: int = Field(default=256, gt=0)
    steps: int = Field(default=10, gt=0)
    train_steps: int = Field(default=200, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    force: bool = False

    @model_validator(mode="after")
    def _has_one_budget(self) -> EvolveOptions:
        if (self.budget_ms is None) == (self.budget_ratio is None):
            raise ValueError("give one budget: budget_ratio, such as 0.5, or budget_ms")
        return self


class StepOptions(Options):
    """Beside the section `step_distillation`: at once, or by successive halvings."""

    schedule: Literal["direct", "progressive"] = "direct"


class GuidanceOptions(Options):
    """Beside the section `guidance`: the one scale to fold in, and the steps on whose times it is trained."""

    fixed: float | None = None
    steps: int | None = Field(default=None, gt=0)


class QuantizeOptions(Options):
    """`pocketfusion quantize`; one of the two budgets."""

    min_sqnr: float | None = Field(default=None, gt=0)
    max_mb: float | None = Field(default=None, gt=0)
    forms: tuple[Form, ...] = ("int8-dynamic", "int8", "float16")
    target: Literal["litert-cpu", "litert-gpu"] = "litert-cpu"
    samples: int = Field(default=4, gt=0, le=10)

    @model_validator(mode="after")
    def _has_one_budget(self) -> QuantizeOptions:
        if (self.min_sqnr is None) == (self.max_mb is None):
            raise ValueError("give one budget: min_sqnr, such as 28 dB, or max_mb")
        return self


class ExportOptions(Options):
    """`pocketfusion export`; `weights` are every network's where a stage `quantize` has not chosen them. `for`: a
    device whose settings are taken where nothing else is said."""

    device: DeviceName | None = Field(default=None, alias="for")
    weights: Form | None = None
    text_encoder_weights: Form | None = None
    unet_weights: Form | None = None
    decoder_weights: Form | None = None
    target: Literal["litert-cpu", "litert-gpu"] | None = None
    size: tuple[int, int] | None = None
    rewrites: tuple[str, ...] = ()
    two_calls: bool | None = None
    scheduler_step: bool = False
    decoder_tile: int | None = Field(default=None, ge=0)
    gpu_fp32: tuple[str, ...] | None = None
    gate_steps: int = Field(default=5, gt=0, le=50)
    steps: int | None = Field(default=None, gt=0)
    guidance: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_the_devices_target(cls, values: Any) -> Any:
        device = DEVICES.get(str(values.get("for"))) if isinstance(values, dict) else None
        return {"target": device.target, **values} if device is not None else values

    def given(self, recipe: Path | None) -> dict[str, Any]:
        """What is said, as `mobile.outlook.prepare` takes it."""
        own = {name: getattr(self, f"{name}_weights") or self.weights for name in ("text_encoder", "unet", "decoder")}
        same = ("target", "size", "rewrites", "two_calls", "scheduler_step", "decoder_tile", "gpu_fp32", "gate_steps")
        return {
            "weights": {name: form for name, form in own.items() if form},
            "recipe": recipe,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            **{name: getattr(self, name) for name in same},
        }


class CheckOptions(Options):
    """`pocketfusion check`."""

    static: bool = False
    precision: Literal["fp32", "fp16"] | None = None
    threads: int = Field(default=1, gt=0)
    timeout: float = Field(default=600, gt=0)


class EvaluateOptions(Options):
    """`pocketfusion evaluate`; its systems are stages, as NAME or NAME@STEPS."""

    guidance: tuple[float, ...] = (1, 2, 3, 4.5, 6, 8)
    samples: int = Field(default=768, gt=0)
    sets: tuple[str, ...] = ("test_combo",)
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    diversity_prompts: int = Field(default=32, ge=0)
    diversity_images: int = Field(default=4, ge=0)
    kid_only: bool = False


class BenchOptions(Options):
    """`pocketfusion bench`; its bundles are stages."""

    runs: int = Field(default=10, gt=0)
    threads: int | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, gt=0)
    mode: Literal["resident", "pipelined", "sequential"] = "resident"


Makes = Literal["data", "loss judge", "autoencoder", "judge", "model", "latency", "weights", "bundle", "result"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Takes:
    """An input: what it has to be, and which earlier stage gives it where the recipe does not say.

    `default`: the nearest earlier stage that makes it, or the nearest of these kinds. `optional`: none where none is
    earlier; `named`: none where none is named. `only_with`: taken, and needed, if this setting of the stage is not 0.
    `unless`: not taken by default where one of these settings is given. `several`: a list, each perhaps as NAME@STEPS.
    """

    makes: tuple[Makes, ...]
    default: tuple[str, ...] = ()
    optional: bool = False
    named: bool = False
    only_with: str | None = None
    unless: tuple[str, ...] = ()
    several: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of stage. `section`: of the recipe, with its training. `reads`: what else of the recipe it depends on,
    as dotted names. `scores`: what it measures, and which way is better."""

    makes: Makes
    takes: Mapping[str, Takes] = field(default_factory=dict)
    section: str | None = None
    options: type[Options] = Options
    reads: tuple[str, ...] = ()
    scores: Mapping[str, Better] = field(default_factory=dict)


_DATA = Takes(("data",))
_MODEL = Takes(("model",))
_BASE = Takes(("model",), default=("to-v", "base"))
_WEIGHTS = ("weights", "text_encoder_weights", "unet_weights", "decoder_weights")
_LOSS_JUDGE = Takes(("loss judge",), only_with="loss.feature_weight")
_VALIDATED: dict[str, Better] = {"val_mse": "lower"}
_RETRIEVAL: dict[str, Better] = {"val_combo_top1": "higher", "val_combo_top5": "higher"}
#: What every stage that trains a UNet on latents depends on beside its own section.
_UNET = (
    "data",
    "text",
    *(f"teacher.{name}" for name in TeacherSettings.model_fields if name not in ("unet", "train")),
)

KINDS: dict[str, Kind] = {
    "data": Kind("data", options=DataOptions, reads=("data.size",), scores={"pictures": "higher"}),
    "loss-judge": Kind("loss judge", {"data": _DATA}, "loss_judge", reads=("data", "text"), scores=_RETRIEVAL),
    "autoencoder": Kind(
        "autoencoder",
        {"data": _DATA, "loss-judge": _LOSS_JUDGE},
        "autoencoder",
        reads=("data",),
        scores={"val_psnr_db": "higher"},
    ),
    "judge": Kind("judge", {"data": _DATA}, "judge", reads=("data", "text"), scores=_RETRIEVAL),
    "base": Kind(
        "model",
        {"data": _DATA, "autoencoder": Takes(("autoencoder",))},
        "teacher",
        reads=("data", "text"),
        scores=_VALIDATED,
    ),
    "to-v": Kind("model", {"data": _DATA, "folder": _MODEL}, "to_v", reads=_UNET, scores=_VALIDATED),
    "profile": Kind("latency", {"folder": _MODEL}, options=ProfileOptions, scores={"step_ms": "lower"}),
    "elastic": Kind("model", {"data": _DATA, "folder": _MODEL}, "elastic", reads=_UNET, scores=_VALIDATED),
    "evolve": Kind(
        "model",
        {"data": _DATA, "folder": _MODEL, "judge": Takes(("judge",)), "latency": Takes(("latency",))},
        options=EvolveOptions,
        reads=("elastic", *_UNET),
        scores={"latency_ms": "lower", "latency_ratio": "lower"},
    ),
    "recover": Kind(
        "model", {"data": _DATA, "folder": _MODEL, "base": _BASE}, "recovery", reads=_UNET, scores=_VALIDATED
    ),
    "distill-steps": Kind(
        "model",
        {"data": _DATA, "folder": _MODEL, "teacher": _BASE},
        "step_distillation",
        StepOptions,
        reads=_UNET,
        scores={"val_vanilla": "lower", "val_guided": "lower"},
    ),
    "distill-guidance": Kind(
        "model",
        {"data": _DATA, "folder": _MODEL, "teacher": Takes(("model",), named=True)},
        "guidance",
        GuidanceOptions,
        reads=_UNET,
        scores={"val_guided_mse": "lower", "val_guidance_left": "lower"},
    ),
    "distill-consistency": Kind(
        "model",
        {"data": _DATA, "folder": _MODEL, "teacher": _BASE},
        "consistency",
        reads=_UNET,
        scores={"val_landing": "lower", "val_landing_left": "lower"},
    ),
    "distill-decoder": Kind(
        "model",
        {"data": _DATA, "folder": _MODEL, "sampler": Takes(("model",), named=True), "loss-judge": _LOSS_JUDGE},
        "decoder",
        reads=("data",),
        scores={"val_psnr_db": "higher", "val_ssim": "higher", "val_real_psnr_db": "higher"},
    ),
    "quantize": Kind(
        "weights", {"folder": _MODEL}, options=QuantizeOptions, scores={"sqnr_db": "higher", "mb": "lower"}
    ),
    "export": Kind(
        "bundle",
        {"folder": _MODEL, "recipe": Takes(("weights",), optional=True, unless=_WEIGHTS)},
        options=ExportOptions,
        scores={"sqnr_db": "higher", "guidance_delta": "lower", "mb": "lower"},
    ),
    "check": Kind("result", {"bundle": Takes(("bundle",))}, options=CheckOptions, scores={"graphs_failed": "lower"}),
    "evaluate": Kind(
        "result",
        {
            "data": _DATA,
            "judge": Takes(("judge",)),
            "systems": Takes(("model", "bundle"), default=("base", "distill-decoder"), several=True),
        },
        options=EvaluateOptions,
        scores={"frechet": "lower", "kid": "lower", "clip_score": "higher", "top5": "higher", "lead": "higher"},
    ),
    "bench": Kind(
        "result",
        {"bundles": Takes(("bundle",), several=True)},
        options=BenchOptions,
        scores={"total_ms": "lower", "step_ms": "lower", "peak_mb": "lower"},
    ),
}
