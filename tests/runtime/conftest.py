"""Copies of the tiny bundle that a test may damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketfusion.artefact import sha256_file

Edit = Callable[[Callable[[dict[str, Any]], None]], None]


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def edit(bundle: Path) -> Edit:
    """Applies a function to the copy's manifest."""

    def apply(change: Callable[[dict[str, Any]], None]) -> None:
        file = bundle / "bundle.json"
        manifest = json.loads(file.read_text())
        change(manifest)
        file.write_text(json.dumps(manifest))

    return apply


@pytest.fixture
def sign(bundle: Path, edit: Edit) -> Callable[[str], None]:
    """Writes a file's present hash and size into the copy's manifest, as an attacker or a faulty exporter would."""

    def apply(name: str) -> None:
        def change(manifest: dict[str, Any]) -> None:
            entry = manifest["files"][name]
            file = bundle / entry["path"]
            entry.update(sha256=sha256_file(file), size=file.stat().st_size)

        edit(change)

    return apply
