"""A LoRA adapter's file: its layers with their strengths, whoever wrote it, or a sentence on why it is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pocketfusion.bounded import parse_json
from pocketfusion.errors import PocketfusionError

#: How a tensor's name ends, and what it then is: kohya's names, PEFT's, diffusers' three older ones.
_ROLES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
#: What a tensor's name holds if the file is something else, and what that is called.
_OTHERS = {
    "hada_": "LoHa layers",
    "lokr_": "LoKr layers",
    "oft_": "OFT layers",
    "vera_lambda": "VeRA layers",
    "on_input": "(IA)³ layers",
    ".a1.weight": "GLoRA layers",
    ".diff": "whole weight differences",
    "lora_mid": "layers with a Tucker core (lora_mid)",
    "lora_embedding_": "layers of an embedding",
    "bundle_emb": "learnt tokens beside its layers (give those with --embedding)",
    "emb_params": "a textual inversion (give it with --embedding)",
    "lora_te2_": "layers of a second text encoder, so it is SDXL's",
    "text_encoder_2.": "layers of a second text encoder, so it is SDXL's",
    "lora_transformer_": "layers of a transformer, so it is of another family (SD3, Flux)",
    "transformer.": "layers of a transformer, so it is of another family (SD3, Flux)",
}
_PARTS = ("unet.", "text_encoder.")
_PEFT_PREFIX = "base_model.model."
_CONFIG_LIMIT = 1 << 20
_PLAIN = ("gaussian", "eva", "orthogonal")  #: ways to begin that leave the base's weights as they are


@dataclass(frozen=True)
class LoraLayer:
    """One layer: the weights change by strength * (up @ down); tensors in fp32.

    down [r, in, …], up [out, r, …]; `magnitude` (DoRA, arXiv 2402.09353): the norm that the changed weights are then
    scaled to, for each output, or by LyCORIS also for each input; `peft_magnitude` says that PEFT wrote it.
    """

    key: str  #: of `down` in the file
    down: torch.Tensor
    up: torch.Tensor
    strength: float
    magnitude: torch.Tensor | None = None
    peft_magnitude: bool = False

    @property
    def up_key(self) -> str:
        """The name that `up` has in the file's convention."""
        for ending in _ROLES:
            if self.key.endswith(ending):
                other = ending.replace("down", "up").replace("lora_A", "lora_B")
                return self.key.removesuffix(ending) + other
        raise AssertionError(self.key)


class _Settings(BaseModel):
    """What of PEFT's LoraConfig changes a merge."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)

    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str | None = True


def check_lora(file: Path, scale: float) -> list[LoraLayer]:
    """The adapter's layers; raises PocketfusionError for what is no sound LoRA or cannot be merged right.

    A layer's strength is its own alpha over its own rank; where it has no alpha, or 0, it is 1, as kohya's loader has
    it. PEFT keeps alphas in the file's metadata (`lora_adapter_metadata`) or in `adapter_config.json` beside it.
    """
    if not math.isfinite(scale):
        raise PocketfusionError(
            f"--lora {file}:{scale} is no scale: choose a finite number, 1 for the adapter as trained"
        )
    state, said = _read(file)
    settings = _Strengths(file, said)
    if any(key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")) for key in state):
        raise PocketfusionError(f"{file} is a whole checkpoint and no LoRA: give it as the model that is exported")
    for key, value in state.items():
        for part, what in _OTHERS.items():
            if part in key:
                raise PocketfusionError(f"{file} holds {what}, which cannot be merged ({_short(key)}): leave it out")
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise PocketfusionError(f"{file} cannot be merged: {_short(key)} holds NaN, infinity or integers")
    return [_layer(file, name, tensors, settings, scale) for name, tensors in _grouped(file, state).items()]


def _read(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors in fp32 and PEFT's settings."""
    try:
        if not file.is_file():
            kind = (
                "is not a file: give the adapter's .safetensors file"
                if file.exists()
                else "is not there: check the path"
            )
            raise PocketfusionError(f"the LoRA {file} {kind}")
        state = load_file(str(file))
        with safe_open(str(file), "pt") as opened:
            said = (opened.metadata() or {}).get("lora_adapter_metadata")
        config = file.with_name("adapter_config.json")
        if said is None and file.name == "adapter_model.safetensors" and config.is_file():
            said = config.read_text(encoding="utf-8") if config.stat().st_size < _CONFIG_LIMIT else "too long"
        settings = {} if said is None else parse_json(said)
    except ValueError as error:
        raise PocketfusionError(f"the settings of {file} are damaged: {_short(str(error))}") from None
    except (OSError, SafetensorError, TypeError, AttributeError, KeyError, RuntimeError):  # the last four: odd types
        raise PocketfusionError(
            f"{file} is truncated or not a safetensors file: only safetensors adapters are read"
        ) from None
    if not isinstance(settings, dict):
        raise PocketfusionError(f"the settings of {file} are damaged: they are not a JSON object")
    if not state:
        raise PocketfusionError(f"{file} holds no LoRA: it has no tensors")
    named: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if (name := key.removeprefix(_PEFT_PREFIX)) in named:
            raise PocketfusionError(f"{file} holds {_short(name)} twice, under two names: it cannot be merged")
        named[name] = value.float() if value.is_floating_point() else value
    return named, settings


def _grouped(file: Path, state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, tuple[str, torch.Tensor]]]:
    """Layer → role → the tensor and its name."""
    layers: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    unknown = []
    for key, value in state.items():
        ending = next((ending for ending in _ROLES if key.endswith(ending)), None)
        if ending is None:
            unknown.append(key)
            continue
        layer = layers.setdefault(key.removesuffix(ending), {})
        if _ROLES[ending] in layer:
            raise PocketfusionError(f"{file} holds {_short(key)} twice, under two names: it cannot be merged")
        layer[_ROLES[ending]] = (key, value)
    if unknown and (not layers or not any("lora" in key.lower() for key in state)):
        raise PocketfusionError(f"{file} holds no LoRA: none of its {len(state)} tensors is named as one's are")
    if unknown:
        raise PocketfusionError(
            f"{file} cannot be merged: {_short(unknown[0])} is nothing that a LoRA of Stable Diffusion has"
        )
    return layers


def _layer(
    file: Path,
    name: str,
    tensors: Mapping[str, tuple[str, torch.Tensor]],
    settings: _Strengths,
    scale: float,
) -> LoraLayer:
    for role in ("down", "up"):
        if role not in tensors:
            raise PocketfusionError(f"{file} cannot be merged: the layer {_short(name)} has no {role} matrix")
    (key, down), (_, up) = tensors["down"], tensors["up"]
    rank = down.shape[0] if down.ndim else 0
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or rank == 0 or not up.numel() or not down.numel():
        raise PocketfusionError(f"{file} cannot be merged: {_short(name)} is of rank 0 or no matrix")
    if up.shape[1] != rank or any(side != 1 for side in up.shape[2:]):
        raise PocketfusionError(
            f"{file} cannot be merged: the matrices of {_short(name)} are {list(down.shape)} and {list(up.shape)}, "
            "which do not fit each other"
        )
    magnitude_key, magnitude = tensors.get("magnitude", ("", None))
    if magnitude is not None and scale != 1:
        raise PocketfusionError(
            f"{file} is a DoRA, and tools do not agree on what {scale:g} of one is: merge it with scale 1 or leave it "
            "out"
        )
    if "alpha" in tensors:
        _, value = tensors["alpha"]
        if value.numel() != 1:
            raise PocketfusionError(f"{file} cannot be merged: the alpha of {_short(name)} is not one number")
        alpha = float(value) or rank
        strength = alpha / rank
    else:
        strength = settings.of(name, rank, magnitude is not None)
    return LoraLayer(
        key.replace(".default.", "."), down, up, strength, magnitude, "lora_magnitude_vector" in magnitude_key
    )


class _Strengths:
    """alpha/r, or alpha/√r (rsLoRA, arXiv 2312.03732), with the alpha of PEFT's settings; 1 without one.

    Settings of one part have its name before their keys in a file of both. Each is read once: a file may have tens of
    thousands of patterns.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file = file
        self._own = {part: settings for part in ("", *_PARTS)}
        if any(key.startswith(_PARTS) for key in settings):
            for part in _PARTS:
                own = {key.removeprefix(part): value for key, value in settings.items() if key.startswith(part)}
                self._own[part] = own
        self._read: dict[str, tuple[_Settings, dict[str, tuple[int, float]]]] = {}

    def of(self, name: str, rank: int, magnitudes: bool) -> float:
        """A layer's strength; raises PocketfusionError for settings that are damaged or change more than it."""
        part = next((part for part in _PARTS if name.startswith(part)), "")
        if part not in self._read:
            self._read[part] = self._checked(self._own[part])
        said, alphas = self._read[part]
        if said.use_dora and not magnitudes:
            raise PocketfusionError(
                f"{self.file} is a DoRA without the magnitudes of {_short(name)}: it cannot be merged"
            )
        words = name.removeprefix(part).split(".")
        found = [alphas[end] for i in range(len(words)) if (end := ".".join(words[i:])) in alphas]
        alpha = min(found)[1] if found else said.lora_alpha  # PEFT takes the first pattern that fits
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if said.use_rslora else alpha / rank

    def _checked(self, own: Mapping[str, Any]) -> tuple[_Settings, dict[str, tuple[int, float]]]:
        """Settings, and the name or end of a name → its pattern's number and alpha."""
        try:
            said = _Settings.model_validate({key: own[key] for key in _Settings.model_fields if key in own})
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"][:1]))
            raise PocketfusionError(
                f"the settings of {self.file} are damaged: {where} is not what PEFT writes"
            ) from None
        if isinstance(said.init_lora_weights, str) and said.init_lora_weights not in _PLAIN:
            raise PocketfusionError(
                f"{self.file} was begun with {_short(said.init_lora_weights)}, which changes the base's weights as "
                "well: convert it to a plain LoRA with PEFT first"
            )
        alphas: dict[str, tuple[int, float]] = {}
        for number, (pattern, value) in enumerate(said.alpha_pattern.items()):
            # PEFT takes these for regular expressions; a hostile one could run for ever, and in practice all are names
            literal = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not all(character.isalnum() or character in "._" for character in literal):
                raise PocketfusionError(
                    f"the settings of {self.file} have an alpha for {_short(pattern)}: it is no layer's name"
                )
            alphas.setdefault(literal, (number, value))
        return said, alphas


def _short(text: str) -> str:
    """A name out of the file, fit for a terminal."""
    return ascii(text if len(text) <= 120 else f"{text[:117]}...")[1:-1]
