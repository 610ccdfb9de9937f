"""Prompts that tell tokenizers apart: scripts, accents, emoji, control characters, special and learnt tokens."""

from __future__ import annotations

import random

_WORDS = "a red apple, noto style|two happy cats!|THE sun's 42nd don't|smiling-face #7|<toy>|[MASK] in text|x"
_SCRIPTS = (
    (0x20, 0x7F), (0xA0, 0x17F), (0x300, 0x370), (0x370, 0x400), (0x400, 0x530), (0x5D0, 0x5EB), (0x600, 0x700),
    (0x900, 0x980), (0xE00, 0xE60), (0x1100, 0x1200), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2190, 0x2200),
    (0x2C00, 0x2C60), (0x3040, 0x3100), (0x4E00, 0x4F00), (0xA640, 0xA6A0), (0xAC00, 0xAD00), (0xE000, 0xE010),
    (0xF900, 0xFB00), (0xFB00, 0xFB50), (0xFE00, 0xFE30), (0xFF00, 0xFF70), (0x10400, 0x10450), (0x11380, 0x113D0),
    (0x16D40, 0x16D80), (0x17000, 0x17040), (0x1D400, 0x1D440), (0x1E900, 0x1E944), (0x1F300, 0x1F650),
    (0x1F900, 0x1F9FF), (0x20000, 0x20040), (0x2A6F0, 0x2A740), (0x2F800, 0x2F840), (0xE0000, 0xE0080), (0, 0x20),
)  # fmt: skip
_TELLING = [
    "", " ", "\n", "ΣΊΣΥΦΟΣ ΟΔΥΣΣΕΎΣ", "ΑΣ. ΑΣ", "İstanbul ISPARTA ıI", "ẞtraße", "ﬁﬂ ﬃ",
    "𠀀𪜀你好x你", "Ǆǅǆ Ωmega K Å",
    "👩🏽‍🚀 family 👨‍👩‍👧‍👦 🇩🇪",
    "e\u0301 é e\u0323\u0301 e\u0301\u0323 ệ", "각 각 \u1100\u1161\u11a8", "क्षि हिन्दी", "\u0344\u0390",
    "\x00a\x01b\u200bc\u200dd\ufeff", "a\u0085b\u00a0c\u3000d\u2028e\u2029f", "it's WE'RE i'd've 'S 'tis o'clock''s",
    "[CLS] [SEP] [PAD] [MASK][mask] [UNK]", "<|endoftext|> <|startoftext|> <|ENDOFTEXT|>a<|startoftext|>", "q" * 101,
    "q" * 100, "word " * 500, "苹果" * 300, "a\ud83cb \udf4e c", "😀" * 60, "١٢٣ ⅷ ½ ² 10,000.5", "foo_bar-baz/qux\\x",
    "<toy> and <other>", "a<toy>b<toy><toy>", "<TOY>", "ZAL\u0316\u0300\u0334GO" * 9, "\u0301\u0301", "\t\ttabs\tin\t",
]  # fmt: skip


def odd_prompts(count: int) -> list[str]:
    """`count` of them, always the same: telling ones, words, then random text of every script and of any."""
    chance = random.Random(14)
    made = [*_TELLING, *_WORDS.split("|")]
    while len(made) < count:
        kind = chance.randrange(4)
        parts: list[str] = []
        for _ in range(chance.randrange(1, 40)):
            first, last = chance.choice(_SCRIPTS) if kind else (0, 0x110000)
            if kind == 3:
                first, last = 0x20, 0x7F
            code = chance.randrange(first, last)
            parts.append(chance.choice(["", " ", ""]) + ("" if 0xD800 <= code < 0xE000 else chr(code)))
        made.append("".join(parts))
    return made[:count]
