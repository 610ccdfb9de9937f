"""Which pictures are scored: sets of the data's splits, chosen by hash and never by how they look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from pocketfusion.data.packed import CaptionedImages
from pocketfusion.errors import PocketfusionError

#: Test concepts whose label words all occur in training labels, and those with a word that none has (data.md 1.5).
KNOWN_WORDS, NEW_WORDS = "test_concept_known", "test_concept_new"
DEFAULT_SETS = ("train", "test_combo", KNOWN_WORDS, NEW_WORDS, "test_scene")
TRAIN_SPLITS = ("train", "train_scene")


@dataclass(frozen=True)
class EvaluationSet:
    """Rows of the data that are scored together, in the fixed order that pools of captions follow."""

    name: str
    indices: np.ndarray
    captions: tuple[str, ...]

    @property
    def is_training(self) -> bool:
        """Whether a model may have seen these very pictures."""
        return self.name in TRAIN_SPLITS


def _label_words(row: dict) -> set[str]:
    """The words of a picture's label (its plainest caption if it has none), in lower case."""
    return set(re.findall(r"\w+", row.get("label", row["captions"][0]).lower()))


def _by_hash(text: str) -> str:
    """A sort key that no one chose."""
    return sha256(f"evaluate-v1|{text}".encode()).hexdigest()


def picture_seed(seed: int, key: str) -> int:
    """The noise seed of one picture: it depends on the run's seed and the picture's id alone, not on its place."""
    return int(sha256(f"{seed}|{key}".encode()).hexdigest()[:12], 16)


def members(data: CaptionedImages) -> dict[str, np.ndarray]:
    """Every name that `--sets` takes → indices: the data's splits, and test concepts by known and new words."""
    named = dict(data.splits)
    if "test_concept" in named and "train" in named:
        known = set().union(*(_label_words(data.rows[i]) for i in named["train"]))
        is_known = np.array([_label_words(data.rows[i]) <= known for i in named["test_concept"]])
        named[KNOWN_WORDS], named[NEW_WORDS] = named["test_concept"][is_known], named["test_concept"][~is_known]
    return {name: indices for name, indices in named.items() if len(indices) >= 2}


def choose_sets(data: CaptionedImages, names: Sequence[str] | None, samples: int) -> list[EvaluationSet]:
    """Up to `samples` pictures of each named set (default: those of DEFAULT_SETS that the data has, else all).

    Raises PocketfusionError if `samples` is below 2 or a name is unknown.
    """
    if samples < 2:
        raise PocketfusionError(f"--samples {samples} is too few to score: give at least 2, better 256")
    available = members(data)
    if not names:
        names = [name for name in DEFAULT_SETS if name in available] or list(available)
    unknown = [name for name in names if name not in available]
    if unknown or not names:
        known = ", ".join(available) or "none with two pictures"
        raise PocketfusionError(f"{data.name} has no set named {', '.join(unknown) or 'anything'}: it has {known}")
    chosen = []
    for name in dict.fromkeys(names):
        order = sorted(available[name], key=lambda i: _by_hash(data.rows[i]["id"]))[:samples]
        captions = tuple(data.rows[i]["captions"][0] for i in order)
        chosen.append(EvaluationSet(name, np.array(order), captions))
    return chosen


def shuffled_order(captions: Sequence[str]) -> np.ndarray:
    """A rotation of the captions that leaves the fewest pictures with the words they had, [N]: the floor."""
    count = len(captions)
    shifts = sorted(range(1, count), key=lambda s: abs(s - count // 2))
    best, fewest = shifts[0], count + 1
    for shift in shifts[:32]:
        same = sum(captions[i] == captions[(i + shift) % count] for i in range(count))
        if same < fewest:
            best, fewest = shift, same
        if not same:
            break
    return (np.arange(count) + best) % count
