"""The parts of a `tokenizer.json` that bundles have: those of BERT's and CLIP's tokenizers, and no others.

The library behind it runs what the file says: normalizers that multiply a prompt without end, regular expressions that
never come back, character maps that abort the process. So the file is compared with the parts that `export` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pocketfusion.bounded import MB, read_json

#: CLIP's pattern, with its special tokens as transformers 5 writes it, and without.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_PATTERNS = (_WORDS, r"<\|startoftext\|>|<\|endoftext\|>|" + _WORDS)
_SPACES = {"pattern": {"Regex": r"\s+"}, "content": " "}
_LIMIT = 32 * MB
_MAX_ID = 2**24
#: Letters of a special token or a marker of word parts, and of a word that WordPiece looks up (BERT: 100).
_MAX_TEXT, _MAX_WORD = 100, 1000
#: Vectors of one learnt token, and parts of a normalizer: BERT's and CLIP's few, and one for every learnt vector.
_MAX_VECTORS, _MAX_NORMALIZERS = 64, 1000

#: What stands for a vector of a learnt token: letters of a script of the 11th century (Tangut), as BERT's and CLIP's
#: normalizers leave them as they are, where BERT's drops private code points.
STAND_INS = tuple(map(chr, range(0x17000, 0x187ED)))

Check = Callable[[Any], bool]


def read_tokenizer(path: Path) -> str:
    """The file's text; OSError, or ValueError with the part that no exported tokenizer has."""
    values, content = read_json(path, _LIMIT)
    check_parts(values)
    return content.decode("utf-8")


def check_parts(values: Any) -> None:
    """Raises ValueError with the first part of a `tokenizer.json` that no exported tokenizer has."""
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    for part, check in _PARTS.items():
        if not check(values.get(part)):
            raise ValueError(f"its {part} is none that an exported bundle has")
    if more := set(values) - set(_PARTS):
        raise ValueError(f"it has a part {min(more)[:40]!r} that no exported bundle has")


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_ID


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT and not any("\ud800" <= c <= "\udfff" for c in value)


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is(*values: Any) -> Check:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def _record(optional: tuple[str, ...] = (), **fields: Check) -> Check:
    """An object with exactly these fields."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict) or not set(fields) - set(optional) <= set(value) <= set(fields):
            return False
        return all(fields[key](one) for key, one in value.items())

    return check


def _list(check: Check, most: int) -> Check:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def _one_of(kinds: Mapping[str, Check]) -> Check:
    """An object whose `type` is one of `kinds`, without it what its check takes."""

    def check(value: Any) -> bool:
        if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str) or kind not in kinds:
            return False
        return kinds[kind]({key: one for key, one in value.items() if key != "type"})

    return check


def _vocabulary(value: Any) -> bool:
    if not isinstance(value, dict) or not 0 < len(value) < _MAX_ID or set(map(type, value.values())) != {int}:
        return False
    return min(value.values()) >= 0 and max(value.values()) < _MAX_ID


def _merges(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, str) or (isinstance(one, list) and len(one) == 2 and all(isinstance(p, str) for p in one))
        for one in value
    )


def _learnt_token(value: Any) -> bool:
    """A learnt token's name → one of `STAND_INS` a vector. They are in no name, so none feeds another."""
    if not _record(pattern=_record(String=_text), content=_text)(value):
        return False
    name, content = value["pattern"]["String"], value["content"]
    return (
        bool(name)
        and not any(map(_stand_in, name))
        and 0 < len(content) <= _MAX_VECTORS
        and all(map(_stand_in, content))
    )


def _stand_in(character: str) -> bool:
    return STAND_INS[0] <= character <= STAND_INS[-1]


_NOTHING = _record()
_NORMALIZERS: dict[str, Check] = {
    "BertNormalizer": _record(
        clean_text=_flag, handle_chinese_chars=_flag, strip_accents=_maybe(_flag), lowercase=_flag
    ),
    "NFC": _NOTHING,
    "NFD": _NOTHING,
    "Lowercase": _NOTHING,
    "StripAccents": _NOTHING,
    "Replace": lambda value: value == _SPACES or _learnt_token(value),
}
_BYTES = _record(("use_regex",), add_prefix_space=_flag, trim_offsets=_flag, use_regex=_flag)
_SPLITS: dict[str, Check] = {
    "BertPreTokenizer": _NOTHING,
    "Whitespace": _NOTHING,
    "WhitespaceSplit": _NOTHING,
    "ByteLevel": _BYTES,
    "Split": _record(
        pattern=_is(*({"Regex": pattern} for pattern in _PATTERNS)), behavior=_is("Removed"), invert=_is(True)
    ),
}
_KINDS = ("SpecialToken", "Sequence")
_PIECE = _record(_KINDS, **dict.fromkeys(_KINDS, _record(id=_text, type_id=_id)))
_SPECIAL = _record(id=_text, ids=_list(_id, 1), tokens=_list(_text, 1))


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _text(value[0]) and _id(value[1])


def _template(value: Any) -> bool:
    return _record(single=_list(_PIECE, 8), pair=_list(_PIECE, 16), special_tokens=_specials)(value) and all(
        len(piece) == 1 for piece in (*value["single"], *value["pair"])
    )


def _specials(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 16 and all(map(_SPECIAL, value.values()))


_POST: dict[str, Check] = {
    "TemplateProcessing": _template,
    "BertProcessing": _record(sep=_pair, cls=_pair),
    "RobertaProcessing": _record(sep=_pair, cls=_pair, trim_offsets=_flag, add_prefix_space=_flag),
}
_DECODERS: dict[str, Check] = {
    "WordPiece": _record(prefix=_text, cleanup=_flag),
    "ByteLevel": _BYTES,
    "BPEDecoder": _record(suffix=_text),
}
_MODELS: dict[str, Check] = {
    "WordPiece": _record(
        vocab=_vocabulary,
        unk_token=_text,
        continuing_subword_prefix=_text,
        max_input_chars_per_word=lambda value: _id(value) and value <= _MAX_WORD,
    ),
    "BPE": _record(
        ("byte_fallback", "ignore_merges"),
        vocab=_vocabulary,
        merges=_merges,
        dropout=_is(None),
        unk_token=_maybe(_text),
        continuing_subword_prefix=_maybe(_text),
        end_of_word_suffix=_maybe(_text),
        fuse_unk=_flag,
        byte_fallback=_flag,
        ignore_merges=_flag,
    ),
}
_ADDED = _record(id=_id, content=_text, single_word=_flag, lstrip=_flag, rstrip=_flag, normalized=_flag, special=_flag)


def _sequence(kinds: Mapping[str, Check], name: str, most: int = 8) -> Check:
    """One of `kinds`, or a sequence of up to `most` under `name`."""
    return _one_of({**kinds, "Sequence": _record((), **{name: _list(_one_of(kinds), most)})})


_PARTS: dict[str, Check] = {
    "version": _is("1.0"),
    "truncation": _is(None),  # the runtime's to set, like padding
    "padding": _is(None),
    "added_tokens": _list(_ADDED, 1000),
    "normalizer": _maybe(_sequence(_NORMALIZERS, "normalizers", _MAX_NORMALIZERS)),
    "pre_tokenizer": _maybe(_sequence(_SPLITS, "pretokenizers")),
    "post_processor": _maybe(_one_of(_POST)),
    "decoder": _maybe(_one_of(_DECODERS)),
    "model": _one_of(_MODELS),
}
