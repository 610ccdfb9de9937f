"""CLIP's tokenizer out of open_clip's package: its ids are transformers' and the original byte-pair encoding's."""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import random
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from pocketfusion.errors import PocketfusionError
from pocketfusion.models.bring import clip_words
from pocketfusion.models.bring.clip_words import VOCABULARY, clip_tokenizer

WORDS = [
    *[
        "a",
        "photo",
        "of",
        "an",
        "astronaut",
        "it's",
        "they'll",
        "CAT",
        "naïve",
        "ﬁre",
        "e\u0301",
        "Straße",
        "猫",
        "日本語",
    ],
    *[
        "صورة",
        "हिन्दी",
        "한국어",
        "👩\u200d🚀",
        "🇩🇪",
        "1girl",
        "8k",
        "(masterpiece:1.3)",
        "<lora:x:1>",
        "---",
        "...",
        "@#$%",
    ],
    *[
        "\n",
        "\t",
        "  ",
        "don't",
        "'",
        '"',
        "100%",
        "ß",
        "İ",
        "ǅ",
        "½",
        "Ⅷ",
        "٣",
        "\u00a0",
        "\ufffd",
        "𝔘𝔫𝔦",
        "_",
        "a_b",
    ],
]


def prompts(count: int = 2000) -> list[str]:
    rng = random.Random(0)
    made = ["", " ", "!", "<|endoftext|>", "a <|startoftext|> b", "word " * 100]
    while len(made) < count:
        if rng.random() < 0.3:  # any characters at all
            made.append(
                "".join(chr(rng.choice([rng.randrange(32, 591), rng.randrange(32, 0xD7FF)])) for _ in range(12))
            )
        else:
            made.append(rng.choice(["", " ", ", "]).join(rng.choices(WORDS, k=rng.randrange(1, 12))))
    return made


def folder() -> Path:
    spec = find_spec("open_clip")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def original() -> Any:
    """open_clip's own tokenizer, from its file alone: its package asks for torchvision, itself for ftfy."""
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder() / "tokenizer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ftfy", types.SimpleNamespace(fix_text=lambda text: text))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # which it sets for good
        spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def test_its_ids_are_transformers_and_the_originals(original: Any, tmp_path: Path) -> None:
    """transformers' is made of the published files' layout (vocab.json, merges.txt), numbered by open_clip's code."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): number for piece, number in original.encoder.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    with gzip.open(folder() / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as opened:
        merges = opened.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    published = CLIPTokenizer.from_pretrained(tmp_path)
    clip_tokenizer(77, "<|endoftext|>").save_pretrained(tmp_path / "saved")
    ours = CLIPTokenizer.from_pretrained(tmp_path / "saved")
    assert len(ours) == VOCABULARY == 49408 and ours.model_max_length == 77
    odd = prompts()
    settings: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": 77}
    assert ours(odd, **settings).input_ids == published(odd, **settings).input_ids
    compared = 0
    for (
        prompt
    ) in odd:  # what transformers itself does otherwise is left out: composed letters, entities, its own words
        if prompt.isascii() and "<|" not in prompt and html.unescape(prompt) == prompt:
            assert ours(prompt).input_ids == [49406, *original.encode(prompt), 49407], prompt
            compared += 1
    assert compared > 20


def test_sd2_pads_with_an_exclamation_mark() -> None:
    tokens = clip_tokenizer(77, "!")("a cat", padding="max_length").input_ids
    assert tokens[:5] == [49406, 320, 2368, 49407, 0] and set(tokens[5:]) == {0}


def test_a_missing_or_damaged_package_is_told(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(clip_words, "find_spec", lambda name: None)
    with pytest.raises(PocketfusionError, match="pip install --no-deps open_clip_torch==3.3.0"):
        clip_words.clip_merges()
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(b"\x1f\x8b damaged")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(clip_words, "find_spec", lambda name: spec)
    with pytest.raises(PocketfusionError, match="is damaged: install open_clip_torch"):
        clip_words.clip_merges()
