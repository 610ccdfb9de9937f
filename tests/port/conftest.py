"""The embedded bundle, loaded once, and tokenizers with what they make of odd prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketfusion.artefact import write_json
from pocketfusion.bounded import read_json
from pocketfusion.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def embedded() -> Pipeline:
    """On one thread, as ports are compared."""
    return Pipeline.load(num_threads=1)


@pytest.fixture(scope="session")
def tokenizers(once: Callable) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Folders with a tokenizer and its manifest each, and what Python makes of prompts (`kits.make_tokenizers`)."""
    from kits import make_tokenizers

    def make(root: Path) -> None:
        make_tokenizers(root)
        for folder in (root / "tokenizers").iterdir():
            spec, _ = read_json(folder / "spec.json", 1000)
            write_json(folder / "bundle.json", {"files": {"tokenizer": {"path": "tokenizer.json"}}, "tokenizer": spec})
        shutil.rmtree(root / "files")

    root = once("tokenizers", make) / "tokenizers"
    return [(folder, read_json(folder / "tokens.json", 10**8)[0]) for folder in sorted(root.iterdir())]
