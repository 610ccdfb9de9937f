"""The frozen split: by hash over groups of look-alikes, so that no test picture has a twin in training.

Groups are computed once (`compute_groups`) and kept in `groups.json`; the sets follow from them by SHA-256
(facts/data.md 1.5), so neither a random generator nor a newer emojibase can move a picture between sets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import sha256
from importlib import resources

import numpy as np

from pocketfusion.data.emoji.concepts import Concept

SPLITS = ("train", "val_concept", "test_concept", "val_combo", "test_combo")
NEAR_DUPLICATE_RMS = 6.0
_GENDER_WORDS = re.compile(r"\b(man|woman|person|men|women|people|boy|girl|child|mr|mrs|mx|santa|prince|princess)\b")


def _fraction(text: str) -> float:
    return int(sha256(text.encode()).hexdigest()[:16], 16) / 16**16


def assign_split(group: str, family: str) -> str:
    """The set of every picture of a concept group in a style family."""
    concept = _fraction(f"emoji-split-v1|concept|{group}")
    if concept < 0.10:
        return "test_concept"
    if concept < 0.15:
        return "val_concept"
    combo = _fraction(f"emoji-split-v1|combo|{group}|{family}")
    if combo < 0.10:
        return "test_combo"
    return "val_combo" if combo < 0.13 else "train"


@cache
def frozen_groups() -> dict[str, str]:
    """Concept hex → group, as frozen in the repository."""
    return json.loads((resources.files(__package__) / "groups.json").read_text())


def gender_neutral(label: str) -> str:
    """The label without gender words and directions: the three forms of a profession share it."""
    label = label.lower().split(": facing")[0]
    if label.startswith(("family", "couple", "kiss")):
        return label.split()[0].strip(":")
    label = label.replace("merman", "mermaid").replace("merperson", "mermaid").replace(".", "")
    return " ".join(_GENDER_WORDS.sub(" ", label).replace(":", " ").split()) or label


def compute_groups(
    concepts: list[Concept], thumbnails: Iterable[tuple[Mapping[str, int], np.ndarray]]
) -> dict[str, str]:
    """Union-find over gender forms and near duplicates in any style.

    `thumbnails` gives, for each style, a map hex → row and the pictures as uint8 [N, 16, 16, 3]; two concepts whose
    pictures differ by less than 6/255 RMS are one group. The group's name is its smallest hex.
    """
    parent = {concept.hex: concept.hex for concept in concepts}

    def find(item: str) -> str:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def join(a: str, b: str) -> None:
        low, high = sorted((find(a), find(b)))
        parent[high] = low

    by_label: dict[str, str] = {}
    for concept in concepts:
        join(by_label.setdefault(gender_neutral(concept.label), concept.hex), concept.hex)
    for rows, pictures in thumbnails:
        codes = sorted(rows, key=rows.__getitem__)
        flat = pictures[[rows[code] for code in codes]].reshape(len(codes), -1).astype(np.float32)
        for i, code in enumerate(codes[:-1]):
            rms = np.sqrt(np.mean((flat[i + 1 :] - flat[i]) ** 2, axis=1))
            for j in np.flatnonzero(rms < NEAR_DUPLICATE_RMS):
                join(code, codes[i + 1 + int(j)])
    return {concept.hex: find(concept.hex) for concept in concepts}
