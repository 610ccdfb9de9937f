"""A YAML file that says for each layer how its weights are stored: `quantize` makes it, `export` applies it.

Analyse, choose, apply are three steps, as in Apple's mixed-bit palettisation: the file between them can be read,
edited and kept with the model.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from pocketfusion.artefact import atomic_file
from pocketfusion.bounded import read_yaml
from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.pack import Form
from pocketfusion.mobile.targets import TargetName


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
