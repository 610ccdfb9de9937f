"""The 48 fixed prompts of every contact sheet: 12 training pairs, 12 unseen pairs, 12 unseen concepts, 12 free texts.

The pairs were picked once, as the smallest SHA-256 of `prompts-v1|id` in each set of the frozen split, before any
model drew them; the free texts were written by hand. Neither list follows results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources

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
