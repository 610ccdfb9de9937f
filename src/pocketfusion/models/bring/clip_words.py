"""CLIP's tokenizer, which no checkpoint file carries: its merges come from the package open_clip_torch."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

OPEN_CLIP_VERSION = "3.3.0"
VOCABULARY = 49408  #: 256 bytes, the same at a word's end, 48,894 merges, begin and end
_MERGES = 49152 - 256 - 2  #: of the file's 262,144, those that CLIP was trained with


def clip_merges() -> list[tuple[str, str]]:
    """Its byte-pair merges in order; raises PocketfusionError if the package is not installed or damaged."""
    spec = find_spec("open_clip")  # found, not imported: that would ask for torchvision
    if spec is None or not spec.submodule_search_locations:
        raise PocketfusionError(
            "the package with CLIP's vocabulary is missing: "
            f"pip install --no-deps open_clip_torch=={OPEN_CLIP_VERSION} (its own requirements are not needed)"
        )
    file = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    try:
        with gzip.open(file, "rt", encoding="utf-8") as opened:
            lines = opened.read().split("\n")[1 : _MERGES + 1]
    except (OSError, EOFError, ValueError):
        lines = []
    pairs = [tuple(line.split(" ")) for line in lines]
    if len(pairs) != _MERGES or any(len(pair) != 2 for pair in pairs):
        raise PocketfusionError(f"{file} is damaged: install open_clip_torch=={OPEN_CLIP_VERSION} again")
    return [(first, second) for first, second in pairs]


def clip_tokenizer(length: int, pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer for prompts of `length` tokens; `pad` is SD-1's `<|endoftext|>` or SD-2's `!`."""
    from transformers import CLIPTokenizer

    merges = clip_merges()
    letters = _byte_letters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=length, pad_token=pad)  # type: ignore[arg-type]


def _byte_letters() -> list[str]:
    """A printable letter for every byte, in the order in which GPT-2's byte-pair encoding numbers them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]
