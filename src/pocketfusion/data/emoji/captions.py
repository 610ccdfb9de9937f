"""Captions from CLDR names, keywords and style names, by fixed templates."""

from __future__ import annotations

import re
from hashlib import sha256

from pocketfusion.data.emoji.concepts import Concept
from pocketfusion.data.emoji.packages import STYLES

#: A mirrored drawing would contradict these words.
_DIRECTED = re.compile(
    r"left|right|clock|o’clock|o'clock|thirty|arrow|button|letter|symbol|mark|sign|hand|input|keycap|east|west"
    r"|alphabet|abc|number|medal|note|calendar|flag|watch|musical|zodiac|direction|curl",
    re.IGNORECASE,
)


def may_flip(concept: Concept) -> bool:
    """Whether the mirrored drawing still fits the caption (no directions, letters, clocks or hands)."""
    if concept.group == "symbols":
        return False
    return not any(_DIRECTED.search(text) for text in (concept.label, *concept.tags))


def with_article(noun: str) -> str:
    """`red apple` → `a red apple`; plural and capitalised names stay as they are."""
    if noun[:1].isupper() or (noun.endswith("s") and not noun.endswith(("ss", "us", "is"))):
        return noun
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def captions_for(concept: Concept, style: str) -> list[str]:
    """The captions of one drawing, the plainest first; keywords are picked by hash, so they never change."""
    label, words = concept.label.replace(": ", ", "), STYLES[style].words
    captions = [
        f"{label}, {words} style",
        f"{with_article(label)}, {words} style",
        f"{words} emoji of {label}",
    ]
    tags = [tag for tag in concept.tags if tag.lower() not in label.lower()]
    if tags:
        order = sorted(tags, key=lambda tag: sha256(f"{concept.hex}|{style}|{tag}".encode()).digest())
        captions.append(f"{label} ({', '.join(order[:2])}), {words} style")
    return [*captions, label]
