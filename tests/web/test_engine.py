"""The browser's engine without a browser: its tests run in node, against what Python computes of the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.parametrize("file", ["tokenizer", "numbers", "denoise", "bundle"])
def test_engine(file: str, vitest, vectors: Path) -> None:
    vitest(f"tests/engine/{file}.test.ts", POCKETFUSION_VECTORS=str(vectors))


def test_pictures_carry_their_settings_both_ways(vitest, vectors: Path) -> None:
    from vectors import check_ours

    vitest("tests/engine/png.test.ts", POCKETFUSION_VECTORS=str(vectors))
    check_ours(vectors, json.loads((vectors / "picture.json").read_text()))


@pytest.mark.slow  # a minute: it asks `tokenizers` of every code point
def test_the_unicode_tables_are_those_of_tokenizers() -> None:
    from unicode_tables import FILE, written

    assert FILE.read_text() == written()
