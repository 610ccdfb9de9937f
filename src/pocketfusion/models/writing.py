"""Model folders: stock diffusers components with everything a stock pipeline needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from pocketfusion.artefact import write_json
from pocketfusion.folder import COMPONENTS, PROVENANCE, LicenceNote, weight_files, write_licences
from pocketfusion.models.elastic_unet import ElasticUNet, as_stock
from pocketfusion.models.sampling import SAMPLING
from pocketfusion.models.text_encoder import TextEncoder


def write_base_folder(
    folder: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text: TextEncoder,
    scheduler: DDIMScheduler,
    autoencoder: Path,
    licences: Sequence[LicenceNote],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a folder that `StableDiffusionPipeline.from_pretrained` loads: weights in `dtype`, and licences.

    `vae/` keeps the provenance of `autoencoder`, so that it can be trained on from there.
    """
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=text.encoder,
        tokenizer=text.tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    modules = (unet, vae, text.encoder)
    for module in modules:
        module.to(dtype)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for module in modules:
        module.to(torch.float32)
    load_text_encoder_in_fp32(folder)
    if (autoencoder / PROVENANCE).is_file():
        shutil.copyfile(autoencoder / PROVENANCE, folder / "vae" / PROVENANCE)
    write_licences(folder, [*([text.licence] if text.licence else []), *licences])


def copy_folder(source: Path, out: Path, **replaced: list[str]) -> None:
    """Copies the model folder `source` into the existing folder `out`, but for the components `replaced`.

    Those the caller writes; they are given as `model_index.json` names them: [library, class]. What is not copied, a
    safety checker and its like, is not listed either, so that stock diffusers loads the folder. Provenance, model
    card and pictures are the source's own and are not copied; a provenance inside `vae/` is the autoencoder's. Weights
    that come as a variant alone (`fp16`) get the usual names, which the caller's have: stock diffusers loads one kind.
    """
    own = shutil.ignore_patterns(PROVENANCE, "README.md", "*.png")
    for name in (*COMPONENTS, "licences"):
        if (source / name).is_dir() and name not in replaced:
            shutil.copytree(source / name, out / name, ignore=None if name == "vae" else own)
            _as_usual(out / name)
    if (source / SAMPLING).is_file():
        shutil.copyfile(source / SAMPLING, out / SAMPLING)
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8")) | replaced
    components = [name for name, entry in index.items() if isinstance(entry, list) and name not in replaced]
    index |= {name: [None, None] for name in components if not (out / name).is_dir()}
    if "safety_checker" in index:
        index["requires_safety_checker"] = False  # else diffusers warns that it is gone
    write_json(out / "model_index.json", index)
    load_text_encoder_in_fp32(out)


def _as_usual(folder: Path) -> None:
    """Renames a network's weights if they come as a variant alone, and their index of shards with them."""
    if not any(folder.glob("*.safetensors")):
        return
    files, variant = weight_files(folder)
    if variant is None:
        return
    for index in folder.glob(f"*.safetensors.index.{variant}.json"):
        text = index.read_text(encoding="utf-8").replace(f".{variant}", "")
        index.with_name(index.name.replace(f".{variant}", "")).write_text(text, encoding="utf-8")
        index.unlink()
    for file in files:
        file.rename(file.with_name(file.name.replace(f".{variant}", "")))


def load_text_encoder_in_fp32(folder: Path) -> None:
    """Makes `from_pretrained` without a dtype load the model folder's text encoder in fp32, whatever its weights are.

    So diffusers loads its own networks; transformers would keep the type that they were saved in, and a pipeline of
    both draws nothing (Half against Float).
    """
    file = folder / "text_encoder" / "config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)  # its name before transformers 5
        write_json(file, config | {"dtype": "float32"})


def copy_with_unet(source: Path, out: Path, unet: ElasticUNet, dtype: torch.dtype = torch.float16) -> None:
    """`copy_folder` with `unet` in place of the source's own, its weights saved in `dtype`.

    One of stock architecture is saved as a stock UNet2DConditionModel, so that the folder loads in stock diffusers; an
    evolved one loads there once `pocketfusion.models.elastic_unet` is imported.
    """
    saved = as_stock(unet)
    library = saved.__class__.__module__ if saved is unet else "diffusers"
    copy_folder(source, out, unet=[library, saved.__class__.__name__])
    before = saved.dtype
    saved.to(dtype).save_pretrained(out / "unet", safe_serialization=True)
    saved.to(before)


def write_scheduler(folder: Path, scheduler: DDIMScheduler) -> None:
    """Puts `scheduler` in the place of the model folder's own, whatever class that was."""
    shutil.rmtree(folder / "scheduler", ignore_errors=True)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler.__class__.__name__]
    write_json(folder / "model_index.json", index)
