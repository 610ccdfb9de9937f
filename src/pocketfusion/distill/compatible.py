"""Whether one model folder can teach another: same prompts, same latents, same noise.

A teacher with another text encoder or another latent space sends the student towards something that it cannot see:
SnapFusion's SD-2 teacher failed for a v1.5 student (arXiv 2306.00980).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from pocketfusion.artefact import sha256_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.folder import ENCODER, check_folder, tensors, weights_hash
from pocketfusion.models.noise_schedule import read_ddim_scheduler

#: What of a scheduler decides z_t and the meaning of a prediction; the others only choose timesteps to sample at.
_SCHEDULE = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
)


def check_teacher(student: Path, teacher: Path) -> None:
    """Raises PocketfusionError, naming all that differs, unless the folder `teacher` can teach the folder `student`.

    They must share text encoder and tokenizer, the latents (autoencoder's encoder, scaling factor, the UNets' shape
    of latents), prediction type and noise schedule. Weights are compared in fp16. UNets and decoders may differ. Also
    raised if either is no model folder or a weight of either is NaN or infinite.
    """
    folders = (student, teacher)
    for folder in folders:
        check_folder(folder)
        for name in ("unet", "vae", "text_encoder"):
            _check_finite(folder / name)
    if student.resolve() == teacher.resolve():
        return
    found: list[str] = []

    def compare(what: str, values: Iterable[Any], show: bool = False) -> None:
        ours, theirs = values
        if ours != theirs:
            found.append(f"{what} ({ours} and {theirs})" if show else what)

    compare("text encoder", [(_text_config(folder), weights_hash(folder / "text_encoder")) for folder in folders])
    compare("tokenizer", map(_tokenizer, folders))
    vaes = [AutoencoderKL.load_config(folder / "vae") for folder in folders]
    compare("latent channels", [vae.get("latent_channels", 4) for vae in vaes], show=True)
    compare("latents' scaling_factor", [vae.get("scaling_factor", 0.18215) for vae in vaes], show=True)
    compare("autoencoder's encoder", [weights_hash(folder / "vae", ENCODER) for folder in folders])
    unets = [_json(folder / "unet" / "config.json") for folder in folders]
    compare("latents' size", [unet.get("sample_size") for unet in unets], show=True)
    schedulers = [_scheduler(folder) for folder in folders]
    compare("prediction_type", [scheduler["prediction_type"] for scheduler in schedulers], show=True)
    for key in _SCHEDULE:
        compare(f"noise schedule's {key}", [scheduler[key] for scheduler in schedulers], show=True)
    if found:
        raise PocketfusionError(
            f"{teacher} cannot teach {student}, they differ in {', '.join(found)}: choose a teacher of the same family"
        )


def _check_finite(folder: Path) -> None:
    for name, tensor in tensors(folder):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PocketfusionError(f"{folder}: the weight {name} holds NaN or infinity: the folder cannot be used")


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise PocketfusionError(f"{file} is damaged or missing: restore it from its source") from None


def _scheduler(folder: Path) -> dict[str, Any]:
    return dict(read_ddim_scheduler(folder).config)


def _text_config(folder: Path) -> dict[str, Any]:
    config = _json(folder / "text_encoder" / "config.json")
    incidental = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
    return {key: value for key, value in config.items() if key not in incidental}


def _tokenizer(folder: Path) -> dict[str, Any]:
    """Its vocabulary files by hash (`tokenizer.json` holds all of them where there is one) and its length."""
    files = {file.name: file for file in (folder / "tokenizer").iterdir() if file.is_file()}
    settings = _json(folder / "tokenizer" / "tokenizer_config.json")
    names = ["tokenizer.json"] if "tokenizer.json" in files else sorted(files.keys() - {"tokenizer_config.json"})
    return {name: sha256_file(files[name]) for name in names} | {"length": settings.get("model_max_length")}
