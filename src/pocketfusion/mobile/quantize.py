"""Which form each layer's weight takes: one for the whole network with sensible exceptions, or a recipe's choice."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.flatbuffer import Weight, read, weights
from pocketfusion.mobile.gate import sqnr
from pocketfusion.mobile.pack import FORMS, Form, channel_axis, pack, rounded
from pocketfusion.mobile.targets import TargetName
from pocketfusion.mobile.weight_recipe import NetworkRecipe

#: Weights whose int8 rounding alone keeps less than this, in dB, stay float16: one outlier sets their channel's
#: scale. Well-behaved layers keep 40 to 48 dB.
MIN_WEIGHT_SQNR = 34.0
#: Layers that stay float16 when a kind of 8 or 4 bits is asked for without a recipe: the time embedding, which every
#: block hears, and the first and last convolutions of UNet and decoder. They hold under 1 % of SD-1.5's weights.
KEPT = re.compile(r"(time_embedding|conv_in|conv_out|post_quant_conv|decoder\.conv_in|decoder\.conv_out)(\..*)?")


def rounding_sqnr(values: np.ndarray, axis: int = 0) -> float:
    """SQNR in dB of symmetric int8 rounding of `values`, one scale per index of `axis`."""
    return sqnr(values, rounded(values, "int8", axis))


def for_target(form: Form, target: TargetName, operation: str = "") -> Form:
    """`form` of an operation's weight as `target` takes it.

    The GPU delegate refuses int8 weights behind a DEQUANTIZE of a scale per channel. It takes them straight into the
    operation, and unpacks them itself: the same numbers. A float16 embedding table it refuses; float32 it takes.
    """
    if target != "litert-gpu":
        return form
    if form == "float16" and operation == "EMBEDDING_LOOKUP":
        return "float32"
    return "int8-dynamic" if form == "int8" else form


def default_form(weight: Weight, kind: Form, target: TargetName = "litert-cpu") -> Form:
    """The form of one layer where the whole network is to be of `kind`."""
    if kind in ("float32", "float16"):
        return for_target(kind, target, weight.operation)
    kept = weight.operation != "EMBEDDING_LOOKUP" and (
        KEPT.fullmatch(weight.module) or rounding_sqnr(weight.values, channel_axis(weight.operation)) < MIN_WEIGHT_SQNR
    )
    return "float16" if kept else for_target(kind, target)


def quantize(
    source: Path, target: Path, weights_as: str | NetworkRecipe, device: TargetName = "litert-cpu"
) -> dict[str, Form]:
    """Writes `source` (fp32) at `target` with smaller weights, atomically; returns each layer's form.

    `weights_as`: a form for all layers but those that it would hurt (`default_form`), or a recipe's choices.
    Raises PocketfusionError for a file that is no `.tflite`, and for a recipe that names unknown layers.
    """
    choose: Callable[[Weight], Form]
    try:
        if isinstance(weights_as, NetworkRecipe):
            forms = weights_as.forms([weight.module for weight in weights(read(source))])
            choose = lambda weight: for_target(forms[weight.module], device, weight.operation)  # noqa: E731
        else:
            kind: Form = weights_as  # type: ignore[assignment]  # one of FORMS, checked by callers
            choose = lambda weight: default_form(weight, kind, device)  # noqa: E731
        return pack(source, target, choose)
    except (OSError, PocketfusionError):
        raise
    except Exception as error:  # flatbuffers' readers raise whatever the bytes lead them to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PocketfusionError(
            f"{source.name} cannot be given other weights ({reason[:200]}): it is not a float32 .tflite file"
        ) from error


def coarsest(forms: dict[str, Form]) -> Form:
    """The coarsest form among layers; float32 of none."""
    return max(forms.values(), key=FORMS.index, default="float32")  # type: ignore[return-value]
