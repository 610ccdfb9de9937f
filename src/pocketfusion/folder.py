"""Model folders: the diffusers layout with safetensors only, plus `provenance.json`."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pocketfusion import __version__
from pocketfusion.artefact import sha256_folder, write_json
from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from torch import nn

PROVENANCE = "provenance.json"
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
#: What of an autoencoder makes the latents, by the names of its weights.
ENCODER = ("encoder.", "quant_conv.")
_NO_WEIGHT = ("position_ids",)  # a buffer that some transformers versions save
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


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

    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if ".fp16." not in file.name] or files  # a variant beside the full weights
    if not files:
        raise PocketfusionError(f"{folder} holds no safetensors: convert its weights first")
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (not a dict)
                    if name.startswith(prefixes) and not name.endswith(_NO_WEIGHT):
                        yield name, weights.get_tensor(name)
        except (SafetensorError, OSError):
            raise PocketfusionError(f"{file} is damaged: restore it from its source") from None


def check_folder(path: Path, components: tuple[str, ...] = COMPONENTS) -> None:
    """Raises PocketfusionError unless `path` is a model folder with `components` and no pickled weights."""
    if not path.is_dir():
        raise PocketfusionError(f"there is no model folder at {path}: check the path")
    index = path / "model_index.json"
    if not index.is_file():
        raise PocketfusionError(f"{path} is not a model folder: it has no model_index.json")
    try:
        json.loads(index.read_text(encoding="utf-8"))
    except ValueError:
        raise PocketfusionError(f"{index} is not valid JSON: restore it from its source") from None
    missing = [name for name in components if not (path / name).is_dir()]
    if missing:
        raise PocketfusionError(f"{path} lacks {', '.join(missing)}/: a model folder has {', '.join(components)}")
    for name in components:
        weights = [p for p in (path / name).iterdir() if p.suffix in _PICKLED]
        if weights and not list((path / name).glob("*.safetensors")):
            raise PocketfusionError(f"{weights[0]} is pickled and is never read: convert it to safetensors first")


def check_finite(module: nn.Module, name: str) -> None:
    """Raises PocketfusionError naming the first parameter that holds NaN or infinity."""
    for key, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not math.isfinite(float(tensor.float().abs().sum())):
            raise PocketfusionError(f"{name}: the weight {key} holds NaN or infinity: the folder cannot be used")


def load_pipeline(path: Path) -> StableDiffusionPipeline:
    """Loads a model folder as a stock diffusers pipeline in fp32, checked; a safety checker is left out, there or not.

    Raises PocketfusionError if it is not a model folder, holds pickled weights, a component does not load, or a
    weight is NaN.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    # diffusers finds our classes only once they are imported
    import pocketfusion.models.elastic_unet
    import pocketfusion.models.slim_autoencoder  # noqa: F401

    check_folder(path)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            path,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PocketfusionError(f"{path} could not be loaded ({reason[:200]})") from None
    for name in ("unet", "vae", "text_encoder"):
        check_finite(getattr(pipeline, name), f"{path}/{name}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
