"""Prompts to token ids: `tokenizers` alone, cut or padded to the text encoder's fixed length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import TokenizerSpec
from pocketfusion.runtime.trust.vocabulary import read_tokenizer


@dataclass(frozen=True)
class Tokens:
    """A prompt as the text encoder takes it."""

    input_ids: npt.NDArray[np.int32]  #: [1, max_length]
    attention_mask: npt.NDArray[np.int32]  #: [1, max_length], 1 where a token is, 0 where padding
    warning: str | None  #: what was cut off, or None


def clean_text(text: str) -> str:
    """`text` with lone surrogates (half of a character pair, from undecodable bytes) replaced by U+FFFD."""
    return "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)


class PromptTokenizer:
    """Wraps a bundle's `tokenizer.json`; any script and the empty prompt are fine."""

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        """Raises PocketfusionError if the file is no tokenizer of a kind that bundles have or lacks the padding token,
        and for prompts too short for their special tokens."""
        self.path = path
        with _told(f"{path} is not a tokenizer", "restore it from its source"):
            self._tokenizer = Tokenizer.from_str(read_tokenizer(path))
        special = self._tokenizer.num_special_tokens_to_add(False)
        if special >= spec.max_length:
            raise PocketfusionError(
                f"prompts have {spec.max_length} tokens and {path} adds {special}: export the bundle again"
            )
        if self._tokenizer.token_to_id(spec.pad_token) != spec.pad_token_id:
            raise PocketfusionError(
                f"{path} has no token {spec.pad_token!r} with id {spec.pad_token_id}, as its manifest says: "
                "export the bundle again"
            )
        with _told(f"{path} cannot be set to {spec.max_length} tokens", "export the bundle again"):
            self._tokenizer.enable_truncation(spec.max_length)
            self._tokenizer.enable_padding(length=spec.max_length, pad_id=spec.pad_token_id, pad_token=spec.pad_token)

    def encode(self, prompt: str) -> Tokens:
        """Token ids and mask of `prompt`, with a warning that says from which word on it was cut, if it was."""
        prompt = clean_text(prompt)
        with _told(f"{self.path} cannot read the prompt", "restore it from its source"):
            encoding = self._tokenizer.encode(prompt)
            return Tokens(
                np.array([encoding.ids], np.int32),
                np.array([encoding.attention_mask], np.int32),
                _cut(prompt, encoding) if encoding.overflowing else None,
            )


@contextmanager
def _told(what: str, cure: str) -> Iterator[None]:
    """Turns whatever the native library raises into PocketfusionError, its panics too, which are no `Exception`."""
    try:
        with quiet():  # a panic writes to standard error before it is raised
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PocketfusionError(f"{what} ({' '.join(str(reason).split())[:200]}): {cure}") from None


def _cut(prompt: str, encoding) -> str:  # type: ignore[no-untyped-def]  # tokenizers.Encoding ships no types
    kept = encoding.special_tokens_mask.count(0)
    total = kept + sum(part.special_tokens_mask.count(0) for part in encoding.overflowing)
    first = encoding.overflowing[0]
    words = zip(first.offsets, first.special_tokens_mask, strict=True)
    start = next((offset[0] for offset, special in words if not special), 0)
    word = len(prompt[: start + 1].split())
    rest = prompt[start:]
    snippet = rest if len(rest) <= 40 else rest[:40] + "…"
    return f'the prompt has {total:,} tokens and {kept} fit: it is cut at word {word}, where "{snippet}" begins'
