"""Model folders: the diffusers layout with safetensors only, plus `provenance.json` and licence notes."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pocketfusion import __version__
from pocketfusion.artefact import sha256_folder, write_json
from pocketfusion.errors import PocketfusionError
from pocketfusion.recognise import OTHER_INPUTS, PICKLED, what_file

if TYPE_CHECKING:
    import torch
    from torch import nn


PROVENANCE = "provenance.json"
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
#: What the pipeline's class of another family is called, and what it is.
_OTHER_PIPELINES = {
    "StableDiffusion3": "Stable Diffusion 3",
    "Sana": "SANA",
    "Flux": "Flux",
    "PixArt": "PixArt",
    "XL": "SDXL",
    "Inpaint": "inpainting",
    "InstructPix2Pix": "InstructPix2Pix",
    "Upscale": "upscaling",
    "Depth2Img": "depth-to-image",
    "Kandinsky": "Kandinsky",
}
_LFS = b"version https://git-lfs"
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+))?\.safetensors")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
#: What of an autoencoder makes the latents, by the names of its weights.
ENCODER = ("encoder.", "quant_conv.")
_NO_WEIGHT = ("position_ids",)  # a buffer that some transformers versions save


class Provenance(BaseModel):
    """How an artefact came to be: enough to repeat it."""

    model_config = ConfigDict(extra="forbid")

    stage: str
    pocketfusion: str = __version__
    settings: dict[str, Any]
    parents: dict[str, str] = {}  #: role → SHA-256 of the parent folder
    data: dict[str, Any] = {}
    seed: int = 0
    samples_seen: int = 0
    hours: float = 0.0
    machine: str = ""
    finished: bool = True
    results: dict[str, Any] = {}


def machine() -> str:
    """One line on the machine at hand, for provenance and result files."""
    import os

    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"


def read_provenance(path: Path) -> Provenance | None:
    """The folder's provenance, or None if it has none; raises PocketfusionError if it is damaged."""
    file = path / PROVENANCE
    if not file.is_file():
        return None
    try:
        return Provenance.model_validate_json(file.read_text(encoding="utf-8"))
    except (ValidationError, ValueError):
        raise PocketfusionError(
            f"{file} is damaged or from a newer pocketfusion: restore it from its source"
        ) from None


def write_provenance(path: Path, provenance: Provenance) -> None:
    """Writes `provenance.json` into the folder."""
    write_json(path / PROVENANCE, provenance.model_dump())


def folder_hash(path: Path) -> str:
    """SHA-256 over all files but the model card and its pictures, so editing a card does not change the model."""
    return sha256_folder(path, exclude=("README.md", *(p.name for p in path.glob("*.png"))))


def weights_hash(folder: Path, prefixes: tuple[str, ...] = ("",)) -> str:
    """SHA-256 over names, shapes and fp16 values of the network's weights whose names begin with one of `prefixes`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors(folder, prefixes), key=lambda pair: pair[0]):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.half().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensors(folder: Path, prefixes: tuple[str, ...] = ("",)) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a network's safetensors; raises PocketfusionError if it has none or one is damaged."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder)[0]:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (not a dict)
                    if name.startswith(prefixes) and not name.endswith(_NO_WEIGHT):
                        yield name, weights.get_tensor(name)
        except (SafetensorError, OSError):
            raise PocketfusionError(f"{file} is damaged: restore it from its source") from None


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors that are a network's weights, and the variant in their names (`fp16`; None: the usual one).

    Of several variants the usual one is taken, then any but the weights without averaging (`non_ema`).
    Raises PocketfusionError if there are none.
    """
    found: dict[str | None, list[Path]] = {}
    every = sorted(folder.glob("*.safetensors"))
    for file in every:
        if match := _WEIGHTS.fullmatch(_SHARD.sub("", file.name)):
            found.setdefault(match["variant"], []).append(file)
    if not every:
        raise PocketfusionError(f"{folder} holds no safetensors: convert its weights first")
    if not found:
        return every, None
    variant = min(found, key=lambda name: (name is not None, name == "non_ema", name != "fp16", name))
    return found[variant], variant


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; raises PocketfusionError if it is missing or holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise PocketfusionError(f"{file} cannot be read ({error.strerror}): restore it from its source") from None
    except (ValueError, RecursionError):
        raise PocketfusionError(f"{file} is not valid JSON: restore it from its source") from None
    if not isinstance(value, dict):
        raise PocketfusionError(f"{file} does not hold a JSON object: restore it from its source")
    return value


def check_folder(path: Path, components: tuple[str, ...] = COMPONENTS) -> None:
    """Raises PocketfusionError unless `path` is a model folder of SD's family with `components`, none of it pickled.

    Another family is refused by its name, and so is a file that git-lfs has not fetched.
    """
    if path.is_file():
        raise PocketfusionError(what_file(path))
    if not path.is_dir():
        raise PocketfusionError(f"there is no model folder at {path}: check the path")
    if not (path / "model_index.json").is_file():
        if (path / "bundle.json").is_file():
            raise PocketfusionError(
                f"{path} is a bundle, not a model folder: give the folder that it was exported from"
            )
        raise PocketfusionError(
            f"{path} is not a model folder: it has no model_index.json, which names its parts: copy it from "
            "the model's source"
        )
    _check_pipeline(path, read_json(path / "model_index.json"))
    missing = [name for name in components if not (path / name).is_dir()]
    if missing:
        raise PocketfusionError(f"{path} lacks {', '.join(missing)}/: a model folder has {', '.join(components)}")
    for name in components:
        for file in (path / name).iterdir():
            if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(_LFS):
                raise PocketfusionError(f"{file} is a git-lfs pointer, not the file itself: run git lfs pull there")
        weights = [p for p in (path / name).iterdir() if p.suffix in PICKLED]
        if weights and not list((path / name).glob("*.safetensors")):
            raise PocketfusionError(f"{weights[0]} is pickled and is never read: convert it to safetensors first")
    if "unet" in components and (path / "unet" / "config.json").is_file():
        config = read_json(path / "unet" / "config.json")
        taken, given = config.get("in_channels", 4), config.get("out_channels", 4)
        if taken != given:
            what = OTHER_INPUTS.get(taken - given) if isinstance(taken, int) and isinstance(given, int) else None
            raise PocketfusionError(
                f"{path} is {f'a model for {what}' if what else 'of another family'}, which is not supported: its "
                f"UNet takes {taken} channels and gives {given}"
            )


def _check_pipeline(path: Path, index: dict[str, Any]) -> None:
    """By the pipeline's class and the parts that it lists; raises PocketfusionError with the family's name."""
    kind = str(index.get("_class_name", ""))
    family = next((name for mark, name in _OTHER_PIPELINES.items() if mark in kind), None)
    listed = {name for name, value in index.items() if isinstance(value, list) and any(value)}
    if "transformer" in listed and "unet" not in listed:
        why = "its network is a transformer (transformer/), not a UNet"
    elif "text_encoder_2" in listed:
        family, why = family or "SDXL", "it has a second text encoder (text_encoder_2/)"
    elif family:
        why = f"its pipeline is {kind[:80]!a}"
    else:
        return
    raise PocketfusionError(
        f"{path} is of {family or 'another family'}, which is not supported: {why}; models of Stable Diffusion 1 and "
        "2 are"
    )


def check_finite(module: nn.Module, name: str) -> None:
    """Raises PocketfusionError naming the first parameter that holds NaN or infinity."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.float().abs().sum())):
            raise PocketfusionError(f"{name}: the weight {key} holds NaN or infinity: the folder cannot be used")


@dataclass(frozen=True)
class LicenceNote:
    """What is under which licence (SPDX identifier), and whom to name."""

    what: str
    spdx: str
    attribution: str

    def text(self) -> str:
        """The note as `licences/NAME.txt` holds it."""
        return f"{self.what}\nSPDX-License-Identifier: {self.spdx}\nAttribution: {self.attribution}\n"


def write_licences(folder: Path, notes: Iterable[LicenceNote]) -> None:
    """Writes `folder/licences/NAME.txt` for each note."""
    target = folder / "licences"
    target.mkdir(parents=True, exist_ok=True)
    for note in notes:
        name = re.sub(r"[^a-z0-9]+", "-", note.what.lower()).strip("-")
        (target / f"{name}.txt").write_text(note.text(), encoding="utf-8")
