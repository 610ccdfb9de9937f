"""TAESD's class, diffusers' `AutoencoderTiny`, from a folder or from one of its original files.

The originals (`taesd_decoder.safetensors`, `taesd_encoder.safetensors`) are the state of one `nn.Sequential` each, so
their keys begin with a layer's number: the encoder's is that of diffusers' `encoder.layers`, the decoder's is one
more, as the tanh clamp in front is a layer there. No config is needed: the shapes say all that weights depend on.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file
from torch import nn

from pocketfusion.artefact import sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import check_finite, folder_hash, read_json
from pocketfusion.models.loading import load_part
from pocketfusion.models.slim_autoencoder import vae_class
from pocketfusion.recognise import PICKLED
from pocketfusion.safetensors_header import read_safetensors_header

Half = Literal["encoder", "decoder"]
_LAYER = re.compile(r"(?:(encoder|decoder)\.layers\.)?(\d+)\.(.+)")
_KL = ("first_stage_model.", "decoder.conv_in.", "decoder.mid", "model.diffusion_model.")


def vae_config(path: Path) -> dict[str, Any]:
    """The config of the autoencoder at `path`: a folder of any class that is known, the model folder that it is the
    `vae/` of, or a file of TAESD's. Read from headers.

    Raises PocketfusionError if it is none, another's than `AutoencoderTiny`'s in one file, or damaged.
    """
    path = _place(path)
    if path.is_dir():
        kind = vae_class(path)
        return read_json(path / "config.json") | {"_class_name": kind.__name__}
    if not path.exists():
        raise PocketfusionError(f"there is no autoencoder at {path}: check the path")
    if path.suffix in PICKLED:
        raise PocketfusionError(f"{path} is pickled and is never read: take the safetensors of the same model")
    halves = _halves(path, {name: one["shape"] for name, one in read_safetensors_header(path)[0].items()})
    if "decoder" not in halves:
        raise PocketfusionError(
            f"{path} is an encoder, which makes latents of pictures: give the decoder (taesd_decoder.safetensors)"
        )
    config = _config(path, "decoder", halves["decoder"])
    config |= _config(path, "encoder", halves["encoder"]) if "encoder" in halves else {}
    return {"_class_name": "AutoencoderTiny", **config}


def load_decoder(path: Path) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder at `path` in fp32, frozen, for decoding: of TAESD's decoder in a file of its own the encoder is
    the one beside it (`encoder` for `decoder` in the file's name), and where there is none, None.

    Raises PocketfusionError as `vae_config` does, and if a weight is missing, unknown, of another shape or NaN.
    """
    path = _place(path)
    vae: Any = load_part(vae_class(path), path) if path.is_dir() else _from_files(path)
    return vae.requires_grad_(False).eval()


def latents_of(vae: AutoencoderKL | AutoencoderTiny, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] as the sampler's latents [N, C, h, w]; a distribution's mean."""
    encoded = vae.encode(pictures)
    latents = encoded.latents if isinstance(vae, AutoencoderTiny) else encoded.latent_dist.mean
    return latents * vae.config.scaling_factor


def check_vae(path: Path, folder: Path) -> None:
    """Raises PocketfusionError, before anything is loaded, unless the autoencoder at `path` decodes the latents of the
    model folder `folder` to pictures of its size."""
    config, known = vae_config(path), vae_config(folder)
    channels, taken = (
        config.get("latent_channels", 4),
        read_json(folder / "unet" / "config.json").get("in_channels", 4),
    )
    if channels != taken:
        raise PocketfusionError(
            f"{path} decodes latents of {channels} channels and the UNet of {folder} makes {taken}: give an "
            "autoencoder for this family"
        )
    if config.get("out_channels", 3) != 3:
        raise PocketfusionError(f"{path} gives pictures of {config['out_channels']} channels: give one of 3")
    if _factor(config) != _factor(known):
        raise PocketfusionError(
            f"{path} draws {_factor(config)} pixels a latent and the autoencoder of {folder} {_factor(known)}: "
            "give one for this family"
        )


def vae_hash(path: Path) -> str:
    """SHA-256 of what `load_decoder` reads at `path`, as `folder_hash` has it for folders."""
    path = _place(path)
    return folder_hash(path) if path.is_dir() else sha256_file(path)


def _factor(config: dict[str, Any]) -> int:
    tiny = config["_class_name"] == "AutoencoderTiny"
    widths = config.get("decoder_block_out_channels", (64,) * 4) if tiny else config.get("block_out_channels", (64,))
    return 2 ** (len(widths) - 1)


def _place(path: Path) -> Path:
    return path / "vae" if (path / "model_index.json").is_file() else path


def _from_files(path: Path) -> AutoencoderTiny:
    config = vae_config(path)
    config.pop("_class_name")
    files, other = [path], path.with_name(path.name.replace("decoder", "encoder"))
    if other != path and other.is_file():
        files.append(other)
        shapes = {name: one["shape"] for name, one in read_safetensors_header(other)[0].items()}
        config |= _config(other, "encoder", _halves(other, shapes).get("encoder", {}))
    with torch.device("meta"):
        vae = AutoencoderTiny(**config)
    state: dict[str, torch.Tensor] = {}
    for file in files:
        for half, layers in _halves(file, load_file(file)).items():
            state |= {f"{half}.layers.{number}.{rest}": weight.float() for (number, rest), weight in layers.items()}
    if not any(key.startswith("encoder.") for key in state):
        vae.encoder = None
    _check_whole(path, vae, state)
    vae.load_state_dict(state, assign=True)
    check_finite(vae, str(path))
    return vae


def _halves(path: Path, named: dict[str, Any]) -> dict[Half, dict[tuple[int, str], Any]]:
    """What a file names, by half, layer number in diffusers' `layers` and the rest of the name."""
    found: dict[Half, dict[tuple[int, str], Any]] = {}
    original: Half = "decoder" if "1.weight" in named else "encoder"
    for name, value in named.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            raise PocketfusionError(_what(path, list(named), name))
        half: Half = original if match[1] is None else match[1]  # type: ignore[assignment]  # one of the two
        number = int(match[2]) - (match[1] is None and original == "decoder")
        found.setdefault(half, {})[number, match[3]] = value
    if not found:
        raise PocketfusionError(f"{path} holds no weights: restore it from its source")
    return found


def _what(path: Path, names: list[str], unknown: str) -> str:
    """Why a file is none of TAESD's."""
    if any("lora" in name for name in names):
        return f"{path} is a LoRA adapter, not an autoencoder: give it to export with --lora"
    if any(name.startswith(_KL) for name in names):
        return (
            f"{path} is not TAESD's but a larger model's file: give a diffusers folder (pocketfusion import makes one)"
        )
    return (
        f"{path} is not TAESD's: it holds {unknown[:80]!a}; give an autoencoder's folder or taesd_decoder.safetensors"
    )


def _config(path: Path, half: Half, layers: dict[tuple[int, str], Any]) -> dict[str, Any]:
    """The half's arguments of `AutoencoderTiny` by its weights' shapes, given by layer and name."""
    kinds: dict[int, list[int]] = {}  # of a block or a convolution, by layer: its weight's shape
    for (number, rest), value in sorted(layers.items(), key=lambda item: item[0][0]):
        if rest in ("weight", "conv.0.weight"):
            kinds[number] = [0 if rest == "weight" else 1, *(int(extent) for extent in getattr(value, "shape", value))]
    blocks = [0]
    for is_block, *_ in list(kinds.values())[1:]:
        if is_block:
            blocks[-1] += 1
        else:
            blocks.append(0)
    shapes = [shape for _, *shape in kinds.values()]
    if len(shapes) < 2 or any(len(shape) != 4 for shape in (shapes[0], shapes[-1])) or len(blocks) < 2:
        raise PocketfusionError(f"{path} is not TAESD's {half}: its layers are others; restore it from its source")
    stages = blocks[:-1]  # behind the last convolution there is nothing
    return {
        f"num_{half}_blocks": tuple(stages),
        f"{half}_block_out_channels": (shapes[0][0],) * len(stages),
        **(
            {"latent_channels": shapes[0][1], "out_channels": shapes[-1][0]}
            if half == "decoder"
            else {"in_channels": shapes[0][1]}
        ),
    }


def _check_whole(path: Path, network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    wanted = {name: list(weight.shape) for name, weight in network.state_dict().items()}
    given = {name: list(weight.shape) for name, weight in state.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if name not in given:
            raise PocketfusionError(f"{path} lacks the weight {name}: restore it from its source")
        if name not in wanted:
            raise PocketfusionError(f"{path} holds {name}, which TAESD has not: restore it from its source")
        if given[name] != wanted[name]:
            raise PocketfusionError(
                f"{path}: the weight {name} is {given[name]} and not {wanted[name]}: restore it from its source"
            )
