"""CLIP in miniature, with random weights: its tokenizer (letters and two words), its text tower, and both towers."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

LENGTH = 16


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges for `re`, `red</w>` and `ca`, `cat</w>`; every other word is spelt."""
    letters = [*string.ascii_lowercase, *string.digits, *",.-"]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", "ca", "cat</w>"]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def text_config(width: int) -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_as_stable_diffusion(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """The files that SD-1.5's own `tokenizer/` has: no tokenizer.json."""
    folder.mkdir(parents=True)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    length, pad = tokenizer.model_max_length, tokenizer.pad_token
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": pad}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_text_encoder(folder: Path, width: int = 32, seed: int = 0) -> Path:
    """`text_encoder/` and `tokenizer/` as a model folder of SD-1.5 has them."""
    torch.manual_seed(seed)
    CLIPTextModel(text_config(width)).eval().save_pretrained(folder / "text_encoder")
    save_as_stable_diffusion(clip_tokenizer(), folder / "tokenizer")
    return folder


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP model folder in transformers' layout: pictures of 28 px, embeddings of 12."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = CLIPConfig(text_config=text_config(16), vision_config=vision, projection_dim=12)
    CLIPModel(config).eval().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder
