"""Which form each layer's weight takes: one for the whole network with sensible exceptions, or a recipe's choice.

A recipe is a YAML file that says for each layer how its weights are stored: `pocketfusion quantize` makes it, `export`
applies it.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pocketfusion.artefact import atomic_file
from pocketfusion.bounded import read_yaml
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.devices import TargetName
from pocketfusion.mobile.flatbuffer import Weight, read, weights
from pocketfusion.mobile.gate import sqnr
from pocketfusion.mobile.quantization.packing import FORMS, Form, channel_axis, pack, rounded

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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Rule(_Strict):
    """The form of all layers whose name, or the name of a module that they are in, is matched whole by a regex."""

    match: str
    weights: Form

    @field_validator("match")
    @classmethod
    def _is_a_regex(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression ({error})") from None
        return value

    def takes(self, layer: str) -> bool:
        """True if the layer, or a module above it, matches."""
        parts = layer.split(".")
        return any(re.fullmatch(self.match, ".".join(parts[: i + 1])) for i in range(len(parts)))


class NetworkRecipe(_Strict):
    """The first rule that takes a layer gives its form; `default` holds for the others."""

    default: Form = "float32"
    rules: tuple[Rule, ...] = ()

    def forms(self, layers: Sequence[str]) -> dict[str, Form]:
        """The form of each of `layers`; raises PocketfusionError for a rule that takes none, with near names."""
        for rule in self.rules:
            if not any(rule.takes(layer) for layer in layers):
                plain = rule.match.replace("\\", "")
                near = difflib.get_close_matches(plain, _modules(layers), n=3, cutoff=0.0)
                raise PocketfusionError(
                    f"the recipe's rule {rule.match!r} matches no layer: the nearest names are {', '.join(near)}"
                )
        return {
            layer: next((rule.weights for rule in self.rules if rule.takes(layer)), self.default) for layer in layers
        }

    @classmethod
    def listing(cls, forms: Mapping[str, Form]) -> NetworkRecipe:
        """A recipe that gives exactly `forms`: the commonest as default, a rule for every other layer."""
        if not forms:
            return cls()
        ((default, _),) = Counter(forms.values()).most_common(1)
        rules = [Rule(match=re.escape(layer), weights=form) for layer, form in forms.items() if form != default]
        return cls(default=default, rules=tuple(rules))


class WeightRecipe(_Strict):
    """The three networks' choices; `model` is the hash of the folder that they were made for."""

    format: Literal["pocketfusion-weights"] = "pocketfusion-weights"
    version: Literal[1] = 1
    model: str | None = None
    target: TargetName = "litert-cpu"
    text_encoder: NetworkRecipe = NetworkRecipe()
    unet: NetworkRecipe = NetworkRecipe()
    decoder: NetworkRecipe = NetworkRecipe()

    @classmethod
    def load(cls, path: Path) -> WeightRecipe:
        """Reads a recipe; raises PocketfusionError if it is missing, not YAML or not a weight recipe."""
        try:
            return cls.model_validate(read_yaml(path))
        except OSError as error:
            raise PocketfusionError(f"{path} cannot be read ({error.strerror}): check the recipe's path") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            what = first["msg"].removeprefix("Value error, ")
            raise PocketfusionError(
                f"{path} is not a weight recipe ({where + ': ' if where else ''}{what}): mend that line or make it "
                "anew with pocketfusion quantize"
            ) from None
        except ValueError as error:
            raise PocketfusionError(
                f"{path} is not YAML within bounds ({error}): make a recipe with pocketfusion quantize"
            ) from None

    def save(self, path: Path) -> None:
        """Writes the recipe, atomically."""
        with atomic_file(path) as partial:
            partial.write_text(yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False))


def _modules(layers: Sequence[str]) -> list[str]:
    """All layers and all modules above them."""
    names = {".".join(layer.split(".")[: i + 1]) for layer in layers for i in range(layer.count(".") + 1)}
    return sorted(names)
