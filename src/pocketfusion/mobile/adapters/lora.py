"""LoRA adapters merged into the weights at export: the bundle has their look and none of their cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.state_dict_utils import (
    DIFFUSERS_OLD_TO_PEFT,
    DIFFUSERS_TO_PEFT,
    UNET_TO_DIFFUSERS,
    convert_state_dict,
)
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.adapters.lora_file import LoraLayer, check_lora
from pocketfusion.mobile.wrappers import StablePipeline
from pocketfusion.models.elastic_unet import ElasticUNet
from pocketfusion.quiet import quiet

_KOHYA = "lora_"
_HALVES = {"unet": "UNet", "text_encoder": "text encoder"}


def merge_lora(pipeline: StablePipeline, file: Path, scale: float = 1.0) -> int:
    """Adds `scale` times the adapter in `file` (safetensors, diffusers', PEFT's or kohya's names) to the weights.

    Naming is diffusers'; strengths are kohya's loader's (see `check_lora`). DoRA is merged at scale 1 (arXiv
    2402.09353, eq. 5; kohya's and LyCORIS's `dora_scale` over either axis).
    Returns how many of the adapter's layers were cut from the model (blocks of an evolved UNet, text layers that are
    skipped): they are left out. Raises PocketfusionError if the file is no LoRA or one of another base, if one of its
    halves reaches nothing, `scale` is not finite, or the merged weights are not.
    """
    layers = check_lora(file, scale)
    modules: dict[str, tuple[LoraLayer, nn.Linear | nn.Conv2d]] = {}
    absent: list[str] = []
    for layer, name in zip(layers, _names(pipeline, layers, file), strict=True):
        module = _module(pipeline, name)
        if module is None:
            absent.append(name)
        elif name in modules:
            raise PocketfusionError(f"{file} cannot be merged: it changes {name} twice, under two names")
        else:
            modules[name] = (layer, module)
    _check_reached(pipeline, file, list(modules), absent)
    for name, (layer, module) in modules.items():
        _check_shape(file, name, layer, module)
    for name, (layer, module) in modules.items():
        merged = _merged(layer, module.weight.detach(), scale)
        if not bool(merged.isfinite().all()):
            raise PocketfusionError(f"{file} cannot be merged: {name} would hold NaN or infinity; try a smaller scale")
        module.weight.data.copy_(merged)
    return len(absent)


def _names(pipeline: StablePipeline, layers: Sequence[LoraLayer], file: Path) -> list[str]:
    """The layers' names in the model, `unet.…` or `text_encoder.…`, by diffusers' converters."""
    kohya = [layer for layer in layers if layer.key.startswith(_KOHYA)]
    # names alone are converted, each carrying the key that it stood for
    keys = {key: layer.key for layer in kohya for key in (layer.key, layer.up_key)}
    try:
        with quiet():
            named, _ = pipeline.lora_state_dict(keys, unet_config=pipeline.unet.config) if keys else ({}, None)
    except (ValueError, KeyError, IndexError):
        named = {}
    new = {old: key for key, old in named.items()}  # of a layer's two keys either will do
    if any(layer.key not in new for layer in kohya):
        raise PocketfusionError(f"{file} is a LoRA of another base: its layers are not named as Stable Diffusion's")
    return [_in_the_model(new.get(layer.key, layer.key)) for layer in layers]


def _in_the_model(key: str) -> str:
    """`text_encoder.text_model.encoder.….to_q_lora.down.weight` → `text_encoder.encoder.….q_proj`."""
    part, _, rest = key.partition(".")
    if part not in _HALVES:  # a file of one network alone leaves its name out
        part, rest = ("text_encoder" if part in ("text_model", "encoder") else "unet"), key
    mapping = UNET_TO_DIFFUSERS if part == "unet" else {**DIFFUSERS_OLD_TO_PEFT, **DIFFUSERS_TO_PEFT}
    (name,) = convert_state_dict({rest: None}, mapping)
    # transformers 5 left this step of CLIP's names out
    path = name.partition(".lora_")[0].removeprefix("text_model.")
    return f"{part}.{path}"


def _module(pipeline: StablePipeline, name: str) -> nn.Linear | nn.Conv2d | None:
    part, _, path = name.partition(".")
    for prefix in ("", "text_model."):
        try:
            module = getattr(pipeline, part).get_submodule(prefix + path)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear | nn.Conv2d):
            return module
    return None


def _check_reached(pipeline: StablePipeline, file: Path, reached: list[str], absent: list[str]) -> None:
    """Raises PocketfusionError if a half found no place, or a layer that was not cut from the model."""
    if not reached:
        raise PocketfusionError(f"{file} is a LoRA of another base: none of its layers is in this model")
    for part, what in _HALVES.items():
        missed = [name for name in absent if name.startswith(part)]
        if missed and not any(name.startswith(part) for name in reached):
            raise PocketfusionError(
                f"the {what} half of {file} reaches nothing here, {missed[0][:120]!r} for one: it is of another {what}"
            )
    if not absent:
        return
    whole = _uncut(pipeline.unet)
    layers = getattr(pipeline.text_encoder.config, "num_hidden_layers", 0)
    for name in absent:
        number = re.fullmatch(r"text_encoder\.encoder\.layers\.(\d{1,3})\..*", name)
        if not (name in whole or (number and int(number[1]) >= layers)):
            raise PocketfusionError(f"{file} is a LoRA of another base: this model has no layer {name[:120]!r}")


def _uncut(unet: UNet2DConditionModel) -> set[str]:
    """Names of the layers of the UNet that `unet` was cut from; none if it is no evolved one."""
    if not isinstance(unet, ElasticUNet):
        return set()
    config = {key: value for key, value in unet.config.items() if not key.startswith("_") and key != "architecture"}
    with torch.device("meta"):
        return {f"unet.{name}" for name, _ in UNet2DConditionModel(**config).named_modules()}


def _check_shape(file: Path, name: str, layer: LoraLayer, module: nn.Linear | nn.Conv2d) -> None:
    ours, theirs = list(module.weight.shape), [layer.up.shape[0], *layer.down.shape[1:]]
    pointwise = {2: [1, 1], 4: []}  # a linear layer and a 1x1 convolution are one: SD 1 has these, SD 2 those
    if ours != theirs and ours + pointwise[len(ours)] != theirs + pointwise[len(theirs)]:
        raise PocketfusionError(f"{file} is a LoRA of another base: {name} is {ours} here and {theirs} in it")
    if layer.magnitude is not None and layer.magnitude.numel() != ours[_magnitude_axis(layer, ours)]:
        raise PocketfusionError(
            f"{file} is a DoRA of another base: the magnitudes of {name} are {list(layer.magnitude.shape)}"
        )


def _magnitude_axis(layer: LoraLayer, shape: Sequence[int]) -> int:
    """0 where there is a magnitude for each output, 1 for each input: LyCORIS writes [out, 1, …] or [1, in, …]."""
    assert layer.magnitude is not None
    if layer.peft_magnitude or layer.magnitude.ndim < 2:
        return 0
    return int(layer.magnitude.shape[0] == 1 and shape[0] != 1)


def _merged(layer: LoraLayer, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """The weights with the layer in them, fp32."""
    moved = weight + (scale * layer.strength) * (layer.up.flatten(1) @ layer.down.flatten(1)).reshape(weight.shape)
    if layer.magnitude is None:
        return moved
    axis = _magnitude_axis(layer, weight.shape)
    norm = torch.linalg.vector_norm(moved, dim=[i for i in range(weight.ndim) if i != axis], keepdim=True)
    return moved * layer.magnitude.reshape(norm.shape) / norm
