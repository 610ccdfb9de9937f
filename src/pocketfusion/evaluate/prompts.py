"""Prompts beside the data's captions: the 48 fixed ones of every contact sheet, and lists of a user's.

The fixed ones are 12 training pairs, 12 unseen pairs, 12 unseen concepts and 12 free texts. The pairs were picked
once, as the smallest SHA-256 of `prompts-v1|id` in each set of the frozen split, before any model drew them; the free
texts were written by hand. Neither list follows results.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from pocketfusion.data.files import json_lines, parse_json, plain_text, read_bytes
from pocketfusion.errors import PocketfusionError

COLUMNS = 8


@dataclass(frozen=True)
class Prompt:
    """One prompt: `set` is train, test_combo, test_concept or free; `id` is the picture's id in the data set."""

    set: str
    id: str
    prompt: str


def fixed_prompts() -> list[Prompt]:
    """The prompts, in the order that contact sheets show them."""
    return [
        Prompt(**entry) for entry in json.loads((resources.files(__package__) / "prompts.json").read_text("utf-8"))
    ]


_MOST = 10_000
_BYTES = 1 << 24
#: Plain things and scenes, with words that any model of the family knows, and two that it may not.
BUILT_IN = (
    "a red apple",
    "a dog face",
    "a smiling face with sunglasses",
    "a castle at night",
    "a sailing boat on the sea",
    "a bowl of noodles",
    "a green heart",
    "a tree above a house on a green background",
    "a yellow taxi",
    "a birthday cake with candles",
    "a blue elephant",
    "a sad robot",
    "three of rocket on a blue background",
    "a woman rowing a boat",
    "a cat left of a dog on a pink background",
    "glorbix of the zanthu",
)


def read_prompts(file: str | None, count: int | None = None) -> list[str]:
    """The first `count` prompts (None: all) of a file, of the standard input (`-`), or BUILT_IN (None).

    A line is a prompt, blank ones are none. If the first begins with { or ", all are JSON: a string, or an object with
    `prompt`. Raises PocketfusionError for a file without prompts, with too many, or one that cannot be read.
    """
    if count is not None and not 1 <= count <= _MOST:
        raise PocketfusionError(f"--count {count} is out of range: choose 1 to {_MOST:,}")
    if file is None:
        return list(BUILT_IN[:count])
    where = "the standard input" if file == "-" else file
    data = sys.stdin.buffer.read(_BYTES + 1) if file == "-" else read_bytes(Path(file), _BYTES)
    if len(data) > _BYTES:
        raise PocketfusionError(f"{where} is too long for a list of prompts: {_BYTES >> 20} MiB is the most")
    lines = [(place, line.strip()) for place, line in json_lines(plain_text(data, where), where)]
    if lines and lines[0][1].startswith(("{", '"')):
        prompts = [_prompt(parse_json(line, place), place) for place, line in lines]
    else:
        prompts = [line for _, line in lines]
    if not prompts:
        raise PocketfusionError(f"{where} has no prompts: write one a line")
    if len(prompts) > _MOST and count is None:
        raise PocketfusionError(
            f"{where} has {len(prompts):,} prompts: take the first with --count, {_MOST:,} at most"
        )
    return prompts[:count]


def _prompt(value: object, where: str) -> str:
    found = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise PocketfusionError(f'{where} holds no prompt: give a string, or an object with "prompt"')
    return found
