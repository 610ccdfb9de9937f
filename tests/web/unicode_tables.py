"""Writes web/src/engine/tokenizer/unicode.ts: what `tokenizers` takes each code point for, found by asking it.

Its Unicode tables are of several old versions, and a browser's of whatever version it has; token ids must not depend
on that. `python tests/web/unicode_tables.py` (a minute) writes the file; a slow test compares it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from tokenizers import Regex, normalizers, pre_tokenizers

FILE = Path(__file__).parents[2] / "web" / "src" / "engine" / "tokenizer" / "unicode.ts"
CODES = [code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
_HEAD = """/**
 * What `tokenizers` takes code points for, as it has tables of several Unicode versions and browsers have others.
 * Made by `python tests/web/unicode_tables.py`: do not edit.
 */

/** A set of code points: the ends of its ranges, alternately first and last + 1, as distances in base 36. */
class CodePoints {
  private readonly ends: Int32Array;

  constructor(distances: string) {
    let end = 0;
    this.ends = Int32Array.from(distances.split(" "), (distance) => (end += Number.parseInt(distance, 36)));
  }

  has(character: string): boolean {
    const code = character.codePointAt(0) as number;
    let [low, high] = [0, this.ends.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] <= code) low = middle + 1;
      else high = middle;
    }
    return low % 2 === 1;
  }
}
"""


def tables() -> dict[str, tuple[str, list[int]]]:
    """By name: what the set is, and its code points."""

    def bert(**flags: bool) -> Callable[[str], str]:
        off = {"clean_text": False, "handle_chinese_chars": False, "strip_accents": False, "lowercase": False}
        normalizer = normalizers.BertNormalizer(**(off | flags))
        return lambda c: normalizer.normalize_str(f"a{c}b")[1:-1]

    def those(holds: Callable[[str], bool]) -> list[int]:
        return [code for code in CODES if holds(chr(code))]

    def matches(pattern: str) -> list[int]:
        split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        return those(lambda c: bool(split.pre_tokenize_str(c)))

    cleaned, chinese, plain = bert(clean_text=True), bert(handle_chinese_chars=True), bert(strip_accents=True)
    nfd, marks, words = normalizers.NFD(), normalizers.StripAccents(), pre_tokenizers.BertPreTokenizer()
    letters, numbers = matches(r"\p{L}"), matches(r"\p{N}")
    others = sorted(set(matches(r"\w")) - set(letters) - set(numbers))
    return {
        "DROPPED": (
            "Dropped by BERT's clean_text: control, format and private characters, U+FFFD",
            those(lambda c: not cleaned(c)),
        ),
        "IDEOGRAPHS": ("Split off by BERT's handle_chinese_chars", those(lambda c: chinese(c) == f" {c} ")),
        "BERT_ACCENTS": ("Dropped by BERT's strip_accents after NFD", those(lambda c: not plain(c))),
        "MARKS": ("Dropped by StripAccents", those(lambda c: not marks.normalize_str(f"a{c}b")[1:-1])),
        "PUNCTUATION": (
            "Words of their own to BERT",
            those(lambda c: [w for w, _ in words.pre_tokenize_str(f"a{c}b")] == ["a", c, "b"]),
        ),
        "LETTERS": (r"\p{L}", letters),
        "NUMBERS": (r"\p{N}", numbers),
        "OTHER_WORD": (r"\w that are neither letters nor numbers", others),
        "SPACES": (r"\s", matches(r"\s")),
        "UNDECOMPOSED": (
            "Younger than the normalisation: NFD leaves them whole",
            those(lambda c: nfd.normalize_str(c) == c and c in _DECOMPOSED),
        ),
    }  # fmt: skip


#: Letters that decompose since Unicode 14 to 17: of what a browser may take apart, what the library does not.
_DECOMPOSED = set(
    map(
        chr,
        [0x105C9, 0x105E4, 0x11383, 0x11385, 0x1138E, 0x11391, 0x113C5, 0x113C7, 0x113C8, 0x11938,
         *range(0x16121, 0x16129), 0x16D68, 0x16D69, 0x16D6A],
    )
)  # fmt: skip


def _distances(codes: Iterable[int]) -> str:
    ends: list[int] = []
    for code in codes:
        if ends and ends[-1] == code:
            ends[-1] = code + 1
        else:
            ends += [code, code + 1]
    return " ".join(_base36(end - before) for before, end in zip([0, *ends], ends, strict=False))


def _base36(number: int) -> str:
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits


def written() -> str:
    """The file's text."""
    text = _HEAD
    for name, (what, codes) in tables().items():
        text += f'\n/** {what}. */\nexport const {name} = new CodePoints(\n  "{_distances(codes)}",\n);\n'
    return text


if __name__ == "__main__":
    FILE.write_text(written())
