"""Which drawing shows which concept: emojibase's concepts joined with each style's files, captioned by templates."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pocketfusion.data.emoji.drawings import STYLES, read_json

COMPONENT_GROUP, FLAG_GROUP = 2, 9
GENDERS = {0: "female", 1: "male"}


@dataclass(frozen=True)
class Concept:
    """One emoji without its drawing: code points, CLDR short name and keywords."""

    hex: str
    label: str
    tags: tuple[str, ...]
    group: str
    gender: str | None = None
    base: str = ""  #: hex of the concept without skin tone; equal to `hex` for base concepts
    shortcodes: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Drawing:
    """One picture of a concept in one style: SVG text, or the path of a WebP file."""

    concept: Concept
    style: str
    source: str | Path = field(repr=False)


def plain_hex(code: str) -> str:
    """Code points in upper case without the variation selector FE0F: `2764-FE0F` → `2764`."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def slug(text: str) -> str:
    """`Mrs. Claus` → `mrs-claus`, as the icon sets name their files."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text.lower().replace("'", "")).strip("-")


def squash(text: str) -> str:
    """A slug without separators: `red-apple` → `redapple`."""
    return slug(text).replace("-", "")


def load_concepts(node_modules: Path, *, skin_tones: bool = False) -> list[Concept]:
    """All concepts of emojibase but flags and components, in Unicode's order; `skin_tones` adds variants."""
    root = node_modules / "emojibase-data"
    names = read_json(root / "meta" / "groups.json")["groups"]
    shortcodes = read_json(root / "en" / "shortcodes" / "emojibase.json")
    concepts = []
    for row in read_json(root / "en" / "data.json"):
        if row.get("group") in (None, COMPONENT_GROUP, FLAG_GROUP):
            continue
        base = plain_hex(row["hexcode"])
        for variant in [row, *(row.get("skins", []) if skin_tones else [])]:
            codes = shortcodes.get(variant["hexcode"], [])
            concepts.append(
                Concept(
                    hex=plain_hex(variant["hexcode"]),
                    label=variant["label"],
                    tags=tuple(row.get("tags", ())),
                    group=names[str(row["group"])],
                    gender=GENDERS.get(row.get("gender", -1)),
                    base=base,
                    shortcodes=tuple([codes] if isinstance(codes, str) else codes),
                )
            )
    return concepts


def iter_drawings(node_modules: Path, style: str, concepts: list[Concept], names: dict[str, str]) -> Iterator[Drawing]:
    """The style's drawings of `concepts`, at most one a concept, in the concepts' order.

    Sets that state code points are joined by them; the others by name, through `names` (see `name_index`).
    """
    package = node_modules / STYLES[style].package
    if style == "fluent-3d":
        files = {plain_hex(p.stem): p for p in sorted((package / "assets").glob("*.webp"))}
        for concept in concepts:
            if concept.hex in files:
                yield Drawing(concept, style, files[concept.hex])
        return
    icons = read_json(package / "icons.json")
    by_hex: dict[str, str] = {}
    chars = package / "chars.json"
    stated = read_json(chars) if chars.is_file() else {}
    for code, name in sorted(stated.items()):
        by_hex.setdefault(plain_hex(code), name)
    if not stated:
        for name in sorted(icons["icons"]):
            code = names.get(name) or names.get(squash(name))
            if code:
                by_hex.setdefault(code, name)
    aliases = icons.get("aliases", {})
    for concept in concepts:
        name = by_hex.get(concept.hex)
        name = aliases[name]["parent"] if name in aliases else name
        icon = icons["icons"].get(name)
        if icon is not None:
            width = icon.get("width", icons.get("width", 16))
            height = icon.get("height", icons.get("height", 16))
            left, top = icon.get("left", 0), icon.get("top", 0)
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
            )
            yield Drawing(concept, style, svg)


def name_index(node_modules: Path, concepts: list[Concept]) -> dict[str, str]:
    """Names → code points, from CLDR labels, emojibase short codes and the names in sets that state code points."""
    index: dict[str, str] = {}
    known = {concept.hex for concept in concepts}
    for concept in concepts:
        for name in (concept.label, *concept.shortcodes):
            index.setdefault(slug(name), concept.hex)
    for style in ("noto", "twemoji", "fluent-flat"):
        for code, name in sorted(read_json(node_modules / STYLES[style].package / "chars.json").items()):
            if plain_hex(code) in known:
                index.setdefault(name, plain_hex(code))
    for name, code in list(index.items()):
        index.setdefault(name.replace("-", ""), code)
    return index


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
