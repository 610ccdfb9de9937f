"""A LoRA adapter merged into the weights at export: the bundle has its look and none of its cost."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.wrappers import StablePipeline
from pocketfusion.quiet import quiet

_NAME = "export"
_PARTS = ("unet", "text_encoder")


def merge_lora(pipeline: StablePipeline, file: Path, scale: float = 1.0) -> int:
    """Adds `scale` times the adapter in `file` (safetensors, diffusers', PEFT's or kohya's names) to the weights.

    Returns how many of the adapter's layers the model does not have, as an evolved UNet may not: they are left out.
    Naming and merging are diffusers' and PEFT's.
    Raises PocketfusionError if the file is no LoRA, is one of another base, or `scale` is not finite.
    """
    state, settings = check_lora(file, scale)
    if not any(key.startswith((*_PARTS, "lora_")) for key in state):  # `unet.save_lora_adapter` leaves its name out
        state = {f"unet.{key}": value for key, value in state.items()}
        settings = {f"unet.{key}": value for key, value in settings.items()}
    with quiet():
        state, alphas = pipeline.lora_state_dict(state, unet_config=pipeline.unet.config)
        state = convert_unet_state_dict_to_peft(state)
    kept = {key: value for key, value in state.items() if _layer(pipeline, key) is not None}
    if not kept:
        raise PocketfusionError(f"{file} is a LoRA of another base: none of its layers is in this model")
    _check_shapes(pipeline, kept, file)
    with quiet():
        if any(key.startswith("unet.") for key in kept):
            pipeline.load_lora_into_unet(kept, alphas, pipeline.unet, adapter_name=_NAME, metadata=settings)
        if any(key.startswith("text_encoder.") for key in kept):
            pipeline.load_lora_into_text_encoder(
                kept, alphas, pipeline.text_encoder, adapter_name=_NAME, metadata=settings
            )
        pipeline.fuse_lora(lora_scale=scale, adapter_names=[_NAME])
        pipeline.unload_lora_weights()
    return len({_path(key) for key in state} - {_path(key) for key in kept})


def check_lora(file: Path, scale: float) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter's tensors and settings; raises PocketfusionError as `merge_lora` does for what is none."""
    if not math.isfinite(scale):
        raise PocketfusionError(f"--lora-scale is {scale}: choose a finite number, 1 for the adapter as trained")
    try:
        state = load_file(str(file))
        with safe_open(str(file), "pt") as opened:
            settings: dict[str, Any] = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except FileNotFoundError:
        raise PocketfusionError(f"there is no LoRA at {file}: check the path") from None
    except (OSError, SafetensorError, ValueError):
        raise PocketfusionError(f"{file} is not a safetensors file: only safetensors adapters are read") from None
    if not any("lora" in key.lower() for key in state):
        raise PocketfusionError(f"{file} holds no LoRA: none of its {len(state)} tensors is named lora")
    return state, settings


def _path(key: str) -> str:
    """The layer that an adapter's tensor belongs to: `unet.down_blocks.….to_q`."""
    return key.partition(".lora_")[0]


def _layer(pipeline: StablePipeline, key: str) -> Any:
    part, _, path = _path(key).partition(".")
    try:
        return getattr(pipeline, part).get_submodule(path)
    except AttributeError:
        return None


def _check_shapes(pipeline: StablePipeline, state: Mapping[str, torch.Tensor], file: Path) -> None:
    """An adapter's input and output widths must be the layer's."""
    for key, value in state.items():
        weight = getattr(_layer(pipeline, key), "weight", None)
        if weight is None:
            continue
        axis = 1 if ".lora_A" in key else 0
        if value.shape[axis] != weight.shape[axis]:
            raise PocketfusionError(
                f"{file} is a LoRA of another base: {_path(key)} is {weight.shape[axis]} wide here and "
                f"{value.shape[axis]} in it"
            )
