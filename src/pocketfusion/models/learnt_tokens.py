"""Textual inversion (arXiv 2208.01618): learnt tokens of one or several vectors, in a folder or a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.trust.vocabulary import STAND_INS

_MOST_VECTORS = 64
_LONGEST = 97  #: letters of a token, whose vectors have three more: a bundle's names have 100


def spell_out(tokenizer: Any) -> None:
    """Makes a fast tokenizer expand a learnt token of several vectors to all of them, in place.

    diffusers keeps such a token as `<x>`, `<x>_1`, `<x>_2` … and expands it in the prompt (`maybe_convert_prompt`),
    which only its pipelines do. Here the tokenizer does it, so that it holds wherever that goes: the ids stay, their
    names become `STAND_INS`, which a replacement before all other normalisation puts in.
    Raises PocketfusionError for a tokenizer that the runtime cannot read, or of more vectors than there are stand-ins.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise PocketfusionError(f"the folder's tokenizer is a {type(tokenizer).__name__}, which has no tokenizer.json")
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = {token["content"]: token for token in said["added_tokens"]}
    free = iter(sorted(set(STAND_INS) - set(ids)))
    spelt: list[tuple[str, str]] = []
    for name in list(ids):
        vectors = [name]
        while (following := f"{name}_{len(vectors)}") in ids:
            vectors.append(following)
        if len(vectors) == 1 or re.fullmatch(r"(.+)_\d+", name) and name.rpartition("_")[0] in ids:
            continue
        own = [character for character, _ in zip(free, vectors, strict=False)]
        if len(own) < len(vectors):
            raise PocketfusionError(f"the folder's tokenizer has over {len(STAND_INS):,} vectors of learnt tokens")
        spelt += [*zip(vectors[1:], own[1:], strict=True), (name, "".join(own))]
        for vector, character in zip(vectors, own, strict=True):
            ids[vector] |= {"content": character, "normalized": True, "special": False}
            vocabulary = said["model"]["vocab"]
            if isinstance(vocabulary, dict) and vector in vocabulary:
                vocabulary[character] = vocabulary.pop(vector)
    if not spelt:
        return
    spelt.sort(key=lambda pair: -len(pair[0]))  # `<x>_1` before the `<x>` within it
    before = [{"type": "Replace", "pattern": {"String": name}, "content": character} for name, character in spelt]
    normalizer = said.get("normalizer")
    after = (
        normalizer["normalizers"]
        if normalizer and normalizer["type"] == "Sequence"
        else [normalizer] * bool(normalizer)
    )
    said["normalizer"] = {"type": "Sequence", "normalizers": [*before, *after]}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(said))


def add_embedding(pipeline: Any, file: Path) -> str:
    """Gives the pipeline the learnt token in `file` (safetensors, diffusers' or A1111's layout); returns its name.

    The name is the file's key in diffusers' layout, else the file's own name. Raises PocketfusionError if the file is
    no textual inversion, of another text encoder, not finite, or its token is known already.
    """
    weight = pipeline.text_encoder.get_input_embeddings().weight
    token, grown = learn(pipeline.tokenizer, weight.detach(), file)
    embedding = torch.nn.Embedding.from_pretrained(grown, freeze=not weight.requires_grad)
    pipeline.text_encoder.set_input_embeddings(embedding)
    pipeline.text_encoder.config.vocab_size = len(grown)
    spell_out(pipeline.tokenizer)
    return token


def learn(tokenizer: Any, weight: torch.Tensor, file: Path) -> tuple[str, torch.Tensor]:
    """Adds the token in `file` to the tokenizer, as `<x>`, `<x>_1` …; returns its name, and `weight` (the text
    encoder's token embeddings) with its vectors behind. Raises PocketfusionError as `add_embedding` does."""
    first = len(tokenizer)
    token, vectors = teach(tokenizer, weight.shape[1], file)
    return token, torch.cat([weight[:first], vectors.to(weight.dtype)])


def teach(tokenizer: Any, width: int, file: Path) -> tuple[str, torch.Tensor]:
    """Adds the token in `file` to the tokenizer of a text encoder of that width; returns its name and its vectors
    [N, width]. Raises PocketfusionError as `add_embedding` does."""
    token, vectors = read_embedding(file)
    if vectors.shape[1] != width:
        raise PocketfusionError(
            f"{file} is of another text encoder: its vectors are {vectors.shape[1]} wide, this one's {width}"
        )
    names = [token, *(f"{token}_{i}" for i in range(1, len(vectors)))]
    known = next((name for name in names if tokenizer.convert_tokens_to_ids(name) != tokenizer.unk_token_id), None)
    if known or token in tokenizer.get_vocab():
        raise PocketfusionError(f"{file} teaches the token {known or token!a}, which the folder has: rename the file")
    tokenizer.add_tokens(names)
    return token, vectors


def read_embedding(file: Path) -> tuple[str, torch.Tensor]:
    """The token's name and its vectors [N, width] fp32; raises PocketfusionError as `add_embedding` does."""
    try:
        if not file.is_file():
            raise PocketfusionError(f"there is no embedding at {file}: check the path")
        state = load_file(str(file))
    except (OSError, SafetensorError, TypeError, AttributeError, KeyError, RuntimeError):  # the last four: odd types
        raise PocketfusionError(
            f"{file} is truncated or not a safetensors file: only safetensors embeddings are read"
        ) from None
    if "clip_g" in state:
        raise PocketfusionError(
            f"{file} is of SDXL: it has vectors for two text encoders ({', '.join(sorted(state))})"
        )
    if any("lora" in key for key in state):
        raise PocketfusionError(f"{file} is a LoRA, not a textual inversion: give it with --lora")
    if len(state) != 1:
        raise PocketfusionError(f"{file} is no textual inversion: one tensor makes one, and it has {len(state)}")
    ((key, value),) = state.items()
    token = file.stem if key in ("emb_params", "string_to_param", "clip_l") else key
    if value.ndim == 1:
        value = value[None]
    if value.ndim != 2 or not 1 <= len(value) <= _MOST_VECTORS or not value.is_floating_point():
        raise PocketfusionError(f"{file} is no textual inversion: its tensor is {list(value.shape)} {value.dtype}")
    if not bool(value.float().isfinite().all()):
        raise PocketfusionError(f"{file} cannot be used: its vectors hold NaN or infinity")
    if not token.strip() or token != token.strip() or not token.isprintable() or len(token) > _LONGEST:
        raise PocketfusionError(f"{file} teaches the token {token[:40]!a}, which no prompt can name: rename it")
    return token, value.float()
