"""The kinds of stage: what each makes, what it takes from which others, and which scores a gate may ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pocketfusion.compress import options as given
from pocketfusion.recipe import TeacherSettings

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
    options: type[given.Options] = given.Options
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
    "data": Kind("data", options=given.DataOptions, reads=("data.size",), scores={"pictures": "higher"}),
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
    "profile": Kind("latency", {"folder": _MODEL}, options=given.ProfileOptions, scores={"step_ms": "lower"}),
    "elastic": Kind("model", {"data": _DATA, "folder": _MODEL}, "elastic", reads=_UNET, scores=_VALIDATED),
    "evolve": Kind(
        "model",
        {"data": _DATA, "folder": _MODEL, "judge": Takes(("judge",)), "latency": Takes(("latency",))},
        options=given.EvolveOptions,
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
        given.StepOptions,
        reads=_UNET,
        scores={"val_vanilla": "lower", "val_guided": "lower"},
    ),
    "distill-guidance": Kind(
        "model",
        {"data": _DATA, "folder": _MODEL, "teacher": Takes(("model",), named=True)},
        "guidance",
        given.GuidanceOptions,
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
        "weights", {"folder": _MODEL}, options=given.QuantizeOptions, scores={"sqnr_db": "higher", "mb": "lower"}
    ),
    "export": Kind(
        "bundle",
        {"folder": _MODEL, "recipe": Takes(("weights",), optional=True, unless=_WEIGHTS)},
        options=given.ExportOptions,
        scores={"sqnr_db": "higher", "guidance_delta": "lower", "mb": "lower"},
    ),
    "check": Kind(
        "result", {"bundle": Takes(("bundle",))}, options=given.CheckOptions, scores={"graphs_failed": "lower"}
    ),
    "evaluate": Kind(
        "result",
        {
            "data": _DATA,
            "judge": Takes(("judge",)),
            "systems": Takes(("model", "bundle"), default=("base", "distill-decoder"), several=True),
        },
        options=given.EvaluateOptions,
        scores={"frechet": "lower", "kid": "lower", "clip_score": "higher", "top5": "higher", "lead": "higher"},
    ),
    "bench": Kind(
        "result",
        {"bundles": Takes(("bundle",), several=True)},
        options=given.BenchOptions,
        scores={"total_ms": "lower", "step_ms": "lower", "peak_mb": "lower"},
    ),
}
