"""Textual inversion: the tokens and states of the stock pipeline, from a folder that holds it or from a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import CLIPTextModel

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile import pipeline_specs
from pocketfusion.models.learnt_tokens import add_embedding, spell_out
from pocketfusion.models.loading import load_pipeline
from pocketfusion.models.text_encoder import load_text_encoder
from pocketfusion.recipe import TextSettings
from pocketfusion.runtime.tokenizer import PromptTokenizer
from pocketfusion.runtime.trust.vocabulary import check_parts
from tiny import tiny_pipeline, tiny_tokenizer
from tiny_clip import LENGTH, clip_tokenizer, text_config

PROMPTS = (
    "red <toy>",
    "<toy>, cat",
    "<toy>",
    "a<toy>b",
    "red cat",
    "<other> and <toy>",
    "<toy> <toy>",
    "Red  <toy>\n",
)


def pipeline() -> StableDiffusionPipeline:
    made = tiny_pipeline()
    torch.manual_seed(3)
    made.register_modules(text_encoder=CLIPTextModel(text_config(32)).eval(), tokenizer=clip_tokenizer())
    return made


def embedding(file: Path, vectors: int, token: str = "<toy>", width: int = 32) -> Path:
    save_file({token: torch.randn(vectors, width, generator=torch.Generator().manual_seed(vectors))}, file)
    return file


def stock_ids(stock: StableDiffusionPipeline, prompt: str) -> list[int]:
    prompt = stock.maybe_convert_prompt(prompt, stock.tokenizer)
    return stock.tokenizer(prompt, padding="max_length", max_length=LENGTH, truncation=True).input_ids


def bundled(loaded: StableDiffusionPipeline, folder: Path) -> PromptTokenizer:
    """As export writes it and the runtime reads it."""
    tokenizer = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    return PromptTokenizer(folder / "tokenizer.json", pipeline_specs.tokenizer_spec(loaded))


@pytest.mark.parametrize("vectors", [1, 3, 12])
def test_tokens_and_states_are_the_stock_pipelines(tmp_path: Path, vectors: int) -> None:
    """In a folder that diffusers saved, in a bundle made of it, in training on it, and with the file at export."""
    stock = pipeline()
    stock.save_pretrained(tmp_path / "plain")
    for token, count in (("<toy>", vectors), ("<other>", 2)):
        stock.load_textual_inversion(str(embedding(tmp_path / f"{token}.safetensors", count, token)), token=token)
    stock.save_pretrained(tmp_path / "learnt")
    loaded, added = load_pipeline(tmp_path / "learnt"), load_pipeline(tmp_path / "plain")
    for token in ("<toy>", "<other>"):
        assert add_embedding(added, tmp_path / f"{token}.safetensors") == token
    trained = load_text_encoder(TextSettings(source=str(tmp_path / "learnt"), max_length=LENGTH))
    tokenizers = [bundled(one, tmp_path) for one in (loaded, added)]
    for prompt in PROMPTS:
        ids, states = stock_ids(stock, prompt), stock.encode_prompt(prompt, "cpu", 1, False)[0]
        for tokenizer in tokenizers:
            assert tokenizer.encode(prompt).input_ids[0].tolist() == ids, prompt
        for ours in (loaded.encode_prompt(prompt, "cpu", 1, False)[0], trained.encode([prompt])[0]):
            torch.testing.assert_close(ours, states)
        torch.testing.assert_close(added.encode_prompt(prompt, "cpu", 1, False)[0], states)


def test_berts_tokenizer_spells_them_out_too() -> None:
    """It drops private characters: a stand-in of no letters matched everywhere, and spelt every other word."""
    tokenizer, grown = tiny_tokenizer(), tiny_tokenizer()
    for one in (tokenizer, grown):
        one.add_tokens(["<x>", "<x>_1", "<y>", "<y>_1"])
    spell_out(grown)
    grown.add_tokens(["<z>", "<z>_1"])  # a file's, at export, after the folder's
    tokenizer.add_tokens(["<z>", "<z>_1"])
    spell_out(grown)
    check_parts(json.loads(grown.backend_tokenizer.to_str()))
    for prompt, stock in (
        ("a red cat", "a red cat"),
        ("a <x> cat, <y>", "a <x> <x>_1 cat, <y> <y>_1"),
        ("<z><x> dog", "<z> <z>_1 <x> <x>_1 dog"),
    ):
        assert grown(prompt).input_ids == tokenizer(stock).input_ids, prompt


def test_a1111s_files_are_named_after_themselves(tmp_path: Path) -> None:
    plain = pipeline()
    assert add_embedding(plain, embedding(tmp_path / "mascot.safetensors", 2, "emb_params")) == "mascot"
    first = len(clip_tokenizer())
    assert plain.tokenizer("a mascot").input_ids[2:4] == [first, first + 1]


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"<toy>": torch.randn(2, 24)}, "of another text encoder: its vectors are 24 wide, this one's 32"),
        ({"<toy>": torch.full((1, 32), float("nan"))}, "NaN or infinity"),
        ({"<toy>": torch.ones(1, 32, dtype=torch.int32)}, "no textual inversion"),
        ({"<toy>": torch.ones(0, 32)}, "no textual inversion"),
        ({"<toy>": torch.ones(1, 2, 32)}, "no textual inversion"),
        ({"<toy>": torch.ones(65, 32)}, "no textual inversion"),
        ({"a": torch.ones(1, 32), "b": torch.ones(1, 32)}, "one tensor makes one, and it has 2"),
        ({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 64)}, "is of SDXL"),
        ({"lora_unet_x.lora_up.weight": torch.ones(1, 32)}, "is a LoRA.*--lora"),
        ({"\x1b[31m": torch.ones(1, 32)}, "which no prompt can name"),
        ({" ": torch.ones(1, 32)}, "which no prompt can name"),
        ({"cat</w>": torch.ones(1, 32)}, "which the folder has"),
        ({"x" * 98: torch.ones(2, 32)}, "which no prompt can name"),
    ],
)
def test_what_is_no_sound_embedding_is_told(tmp_path: Path, state: dict, match: str) -> None:
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(PocketfusionError, match=match):
        add_embedding(pipeline(), tmp_path / "a.safetensors")


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"PK")
    for name, match in (("a.pt", "not a safetensors file"), ("none", "there is no embedding")):
        with pytest.raises(PocketfusionError, match=match):
            add_embedding(pipeline(), tmp_path / name)
