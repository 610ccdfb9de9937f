"""Prompts of every kind become token ids of one length."""

from __future__ import annotations

import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Bundle, TokenizerSpec
from pocketfusion.runtime.tokenizer import PromptTokenizer, clean_text


@pytest.fixture
def tokenizer(tiny_bundle):
    bundle = Bundle.open(tiny_bundle)
    return PromptTokenizer(bundle.file("tokenizer"), bundle.manifest.tokenizer)


def test_ids_and_mask_equal_transformers(tokenizer, tiny_folder):
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_folder / "tokenizer")
    for prompt in ("", "a Red apple, noto style", "red " * 50, "xyzzy 🍎 تفاح"):
        expected = reference(prompt, padding="max_length", max_length=32, truncation=True)
        tokens = tokenizer.encode(prompt)
        assert tokens.input_ids.dtype == tokens.attention_mask.dtype == np.int32
        assert tokens.input_ids.tolist() == [expected["input_ids"]]
        assert tokens.attention_mask.tolist() == [expected["attention_mask"]]


def test_a_long_prompt_is_cut_and_the_warning_says_where(tokenizer):
    words = ["red"] * 29 + ["apple", "blue", "cat"] + ["dog"] * 9968
    tokens = tokenizer.encode(" ".join(words))
    assert tokens.input_ids.shape == (1, 32)
    assert "10,000 tokens and 30 fit" in tokens.warning
    assert 'cut at word 31, where "blue cat dog' in tokens.warning
    assert len(tokens.warning) < 200 and "\n" not in tokens.warning


def test_a_prompt_that_just_fits_is_not_warned_of(tokenizer):
    assert tokenizer.encode("red " * 30).warning is None
    assert tokenizer.encode("red " * 31).warning is not None


def test_a_cut_within_a_word_names_that_word(tokenizer):
    warning = tokenizer.encode("red " * 28 + "qqqq apple").warning  # the last word but one is spelt in four tokens
    assert 'cut at word 29, where "qq apple"' in warning


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "   ",
        "\n",
        "🍎👩🏽‍🚀",
        "تفاحة حمراء",
        "תפוח",
        "แอปเปิ้ลสีแดง",
        "苹果" * 500,
        "\ud83c lone \udf4e",
        "\x00",
        "a\u0300" * 99,
    ],
)
def test_any_script(tokenizer, prompt):
    tokens = tokenizer.encode(prompt)
    assert tokens.input_ids.shape == tokens.attention_mask.shape == (1, 32)
    assert tokens.attention_mask.sum() >= 2


def test_lone_surrogates_are_replaced_and_pairs_kept():
    assert clean_text("a\ud83cb🍎") == "a\ufffdb🍎"


def test_damaged_tokenizer_and_wrong_padding(tmp_path, tiny_bundle):
    spec = TokenizerSpec(max_length=32, pad_token="[PAD]", pad_token_id=0)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(PocketfusionError, match="is not a tokenizer"):
        PromptTokenizer(file, spec)
    with pytest.raises(PocketfusionError, match="no token '<pad>'"):
        PromptTokenizer(tiny_bundle / "tokenizer.json", spec.model_copy(update={"pad_token": "<pad>"}))
