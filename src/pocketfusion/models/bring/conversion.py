"""One network after the other from a checkpoint's file into a model folder's layout, by diffusers' own conversion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as stock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from pocketfusion.artefact import write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.models.bring.configs import text_config, unet_config, vae_config
from pocketfusion.recognise import CLIP, OPEN_CLIP, UNET, VAE, Checkpoint, short

_TYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HALF = torch.float16  #: what weights of 8-bit floats become
_VAE_PARTS = tuple(f"{VAE}{part}" for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))


def write_unet(checkpoint: Checkpoint, folder: Path, sample_size: int, ema: Mapping[str, str]) -> set[str]:
    """Writes `folder`'s config.json and weights, of the tensors `ema` where it names them; returns the tensors used.

    Raises PocketfusionError if one is missing, left over, of another shape, or not finite.
    """
    config = unet_config(checkpoint, sample_size)
    sources = {name: ema.get(name, name) for name in checkpoint.names(UNET)}
    tensors = _read(checkpoint, sources)
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    converted = _converted(checkpoint, lambda: stock.convert_ldm_unet_checkpoint(dict(tensors), network.config))
    _check_used(checkpoint, tensors, converted, network, "UNet")
    network.save_config(folder)
    _write(checkpoint, folder / "diffusion_pytorch_model.safetensors", network, converted, list(sources.values()))
    return set(sources.values()) | set(sources)


def write_vae(checkpoint: Checkpoint, folder: Path, latent_size: int, scaling_factor: float = 0.18215) -> set[str]:
    """As `write_unet` for the autoencoder."""
    config = vae_config(checkpoint, latent_size, scaling_factor)
    names = [name for name in checkpoint.names(VAE) if name.startswith(_VAE_PARTS)]
    bare = [part for part in ("quant_conv", "post_quant_conv") if f"{VAE}{part}.weight" not in checkpoint.tensors]
    config |= {f"use_{part}": False for part in bare}
    if f"{VAE}decoder.mid.attn_1.q.weight" not in checkpoint.tensors:
        config["mid_block_add_attention"] = False
    tensors = _read(checkpoint, {name: name for name in names})
    for name, tensor in tensors.items():
        if ".attn_1." in name and tensor.ndim > 2:  # the original's attention is of 1×1 convolutions
            tensors[name] = tensor.reshape(tensor.shape[:2]) if math.prod(tensor.shape[2:]) == 1 else tensor
    with torch.device("meta"):
        network = AutoencoderKL(**config)
    converted = _converted(checkpoint, lambda: stock.convert_ldm_vae_checkpoint(dict(tensors), network.config))
    _check_used(checkpoint, tensors, converted, network, "autoencoder")
    network.save_config(folder)
    _write(checkpoint, folder / "diffusion_pytorch_model.safetensors", network, converted, names)
    return set(names)


def write_text_encoder(checkpoint: Checkpoint, folder: Path) -> set[str]:
    """As `write_unet` for the text encoder, under the names that published folders have (`text_model.`)."""
    config = CLIPTextConfig(**text_config(checkpoint))
    config.architectures = ["CLIPTextModel"]
    with torch.device("meta"):
        network = CLIPTextModel(config)
    prefix = OPEN_CLIP if checkpoint.open_clip else CLIP
    names = [name for name in checkpoint.names(prefix) if _wanted(name, config.num_hidden_layers)]
    tensors = _read(checkpoint, {name: name for name in names})
    if checkpoint.open_clip:
        shape = SimpleNamespace(config=SimpleNamespace(hidden_size=config.hidden_size))
        converted = _converted(checkpoint, lambda: stock.convert_open_clip_checkpoint(shape, tensors, OPEN_CLIP))
    else:
        converted = _converted(checkpoint, lambda: stock.convert_ldm_clip_checkpoint(tensors))
    named = {name if name.startswith("text_model.") else f"text_model.{name}": one for name, one in converted.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_diff_dict() | {"architectures": ["CLIPTextModel"]})
    _write(checkpoint, folder / "model.safetensors", network, named, names, "text_model.")
    return set(names)


def _wanted(name: str, depth: int) -> bool:
    """Whether a text encoder's tensor is one of the layers that are used, or outside of them, and no buffer."""
    if name.endswith(("position_ids", "logit_scale", "text_projection", "attn_mask", "text_projection.weight")):
        return False
    for part in (".resblocks.", ".encoder.layers."):
        if part in name:
            number = name.partition(part)[2].partition(".")[0]
            return number.isdigit() and int(number) < depth
    return True


def _read(checkpoint: Checkpoint, sources: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """The tensors by name, each the file's `sources[name]`, mapped from the disk; PocketfusionError if damaged."""
    found = {}
    try:
        with safe_open(checkpoint.file, framework="pt") as weights:
            for name, source in sources.items():
                found[name] = weights.get_tensor(checkpoint.sources.get(source, source))
    except (SafetensorError, OSError):
        raise PocketfusionError(f"{checkpoint.file} is damaged: restore it from its source") from None
    return found


def _converted(checkpoint: Checkpoint, convert: Callable[[], dict[str, Any]]) -> dict[str, torch.Tensor]:
    try:
        return convert()
    except (AttributeError, KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
        reason = short(str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise PocketfusionError(
            f"{checkpoint.file} is not laid out as Stable Diffusion's files are ({reason})"
        ) from None


def _check_used(
    checkpoint: Checkpoint,
    given: Mapping[str, torch.Tensor],
    converted: Mapping[str, torch.Tensor],
    network: nn.Module,
    what: str,
) -> None:
    """Raises PocketfusionError for a tensor that finds no place in the network: it is of another architecture."""
    places = network.state_dict()
    used = {id(tensor) for name, tensor in converted.items() if name in places}
    left = [name for name, tensor in given.items() if id(tensor) not in used]
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        raise PocketfusionError(
            f"{checkpoint.file} is of another architecture: its {what} has {short(left[0])}{more}, which Stable "
            "Diffusion's has not"
        )


def _write(
    checkpoint: Checkpoint,
    file: Path,
    network: nn.Module,
    converted: Mapping[str, torch.Tensor],
    names: Any,
    prefix: str = "",
) -> None:
    """Writes the network's weights in the type that most of `names` have, once all are there, whole and finite."""
    where = file.parent.name
    wanted = {f"{prefix}{name}": tensor.shape for name, tensor in network.state_dict().items()}
    if missing := [name for name in wanted if name not in converted]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise PocketfusionError(
            f"{checkpoint.file} lacks the weight {where} {short(missing[0])}{more}: restore it from its source"
        )
    dtype = _TYPES.get(checkpoint.dtype(names), _HALF)
    ready = {}
    for name, shape in wanted.items():
        tensor = converted[name]
        if tensor.shape != shape:
            raise PocketfusionError(
                f"{checkpoint.file}: the weight {where} {short(name)} is {list(tensor.shape)}, where the "
                f"file's other shapes ask for {list(shape)}"
            )
        tensor = tensor.to(dtype).contiguous()
        if not math.isfinite(float(tensor.float().abs().sum())):
            raise PocketfusionError(
                f"{checkpoint.file}: the weight {where} {short(name)} holds NaN or infinity: it cannot be used"
            )
        ready[name] = tensor
    save_file(ready, file, {"format": "pt"})
