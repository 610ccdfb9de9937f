"""Changes that make a model folder as it is saved today one of those that people have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from tiny_clip import save_as_stable_diffusion


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def as_safety_checker_deleted(folder: Path) -> None:
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
         feature_extractor=["transformers", "CLIPImageProcessor"])  # fmt: skip


def as_safety_checker_damaged(folder: Path) -> None:
    as_safety_checker_deleted(folder)
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").write_text("{}")


def as_variant(name: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        for file in folder.rglob("*.safetensors"):
            file.rename(file.with_name(f"{file.stem}.{name}.safetensors"))

    return rename


def with_other_weights_beside(folder: Path) -> None:
    for name in ("non_ema", "fp16"):
        for part in ("unet", "vae", "text_encoder"):
            file = folder / part / ("model" if part == "text_encoder" else "diffusion_pytorch_model")
            zeros = {key: value * 0 for key, value in load_file(f"{file}.safetensors").items()}
            save_file(zeros, f"{file}.{name}.safetensors", {"format": "pt"})
    save_file({"x": torch.zeros(1)}, folder / "unet" / "pytorch_lora_weights.safetensors")


def as_sharded(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "vae"):
        shutil.rmtree(folder / part)
        getattr(pipeline, part).save_pretrained(folder / part, max_shard_size="100KB")


def as_old_layout(folder: Path) -> None:
    """transformers before 5 and diffusers before 0.17: other names, a buffer among the weights, no tokenizer.json."""
    text = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{key}": value for key, value in load_file(text).items()}
    length = json.loads((folder / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    state["text_model.embeddings.position_ids"] = torch.arange(length)[None]
    save_file(state, text, {"format": "pt"})
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(vae).items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}", f"attentions.0.{old}")
        state[key] = value
    assert any("proj_attn" in key for key in state)
    save_file(state, vae, {"format": "pt"})
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    save_as_stable_diffusion(tokenizer, folder / "tokenizer")


def as_linked(folder: Path) -> None:
    """As in the hub's cache."""
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        blob = folder.parent / f"blob-{file.parent.name}-{file.name}"
        file.rename(blob)
        file.symlink_to(blob)


def as_sharded_variant(folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder"):
        shutil.rmtree(folder / part)
        getattr(pipeline, part).save_pretrained(folder / part, max_shard_size="100KB", variant="fp16")
