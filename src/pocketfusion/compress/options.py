"""What a stage that has no section of the recipe is told in the recipe's `stages`; names as its command's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pocketfusion.mobile.devices import DEVICES, DeviceName

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
