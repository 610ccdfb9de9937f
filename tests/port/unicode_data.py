"""Writes src/pocketfusion/port/unicode.json: what `tokenizers` takes each code point for, found by asking it.

A phone's own tables are of whatever Unicode version its system has; token ids must not depend on that, so ports carry
this file. `python tests/port/unicode_data.py` (a minute) writes it; a slow test compares it.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tokenizers import normalizers

sys.path.append(str(Path(__file__).parents[1] / "web"))
from unicode_tables import CODES, tables

FILE = Path(__file__).parents[2] / "src" / "pocketfusion" / "port" / "unicode.json"
_SETS = {
    "dropped": "DROPPED",
    "spaces": "SPACES",
    "ideographs": "IDEOGRAPHS",
    "accents": "BERT_ACCENTS",
    "punctuation": "PUNCTUATION",
    "letters": "LETTERS",
    "numbers": "NUMBERS",
}


def ranges(codes: Iterable[int]) -> list[list[int]]:
    """First and last code point of each run."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return runs


def data() -> dict[str, list[list[int]]]:
    """By name: ranges of code points, or a code point followed by what becomes of it."""
    found = tables()
    lower, nfd, nfc = normalizers.Lowercase(), normalizers.NFD(), normalizers.NFC()

    def changed(normalizer: normalizers.Normalizer) -> list[list[int]]:
        made = ((code, normalizer.normalize_str(chr(code))) for code in CODES)
        return [[code, *map(ord, text)] for code, text in made if text != chr(code)]

    classes: dict[int, list[int]] = {}
    for code in CODES:
        order = unicodedata.combining(chr(code))
        lowest = nfd.normalize_str(f"a\u0300{chr(code)}") if order == 1 else nfd.normalize_str(f"a{chr(code)}\u0334")
        if order and lowest[1 if order == 1 else -1] == chr(code):  # the library knows it, too
            classes.setdefault(order, []).append(code)
    pairs = []
    for code in CODES:
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            first, second = (int(part, 16) for part in parts)
            if nfc.normalize_str(chr(first) + chr(second)) == chr(code):
                pairs.append([first, second, code])
    hangul = range(0xAC00, 0xD7A4)
    return {
        **{name: ranges(found[table][1]) for name, table in _SETS.items()},
        "lower": changed(lower),
        "decomposed": [row for row in changed(nfd) if row[0] not in hangul],
        "classes": [[*run, order] for order, codes in sorted(classes.items()) for run in ranges(codes)],
        "composed": pairs,
    }


def written() -> str:
    """The file's text."""
    lines = [f'  "{name}": {json.dumps(rows, separators=(",", ":"))}' for name, rows in data().items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(written())
