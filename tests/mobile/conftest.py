"""A copy of the tiny folder that may be altered, and conversion replaced by `tiny_bundle`'s files (minutes saved)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def tiny_folder_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def fast_conversion(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`export` copies the tiny bundle's networks instead of converting; all else is real."""
    from pocketfusion.mobile import export

    def copy(module: Any, samples: Any, file: Path, settings: Any) -> None:
        shutil.copyfile(tiny_bundle / f"{file.name.partition('-')[0]}.tflite", file)

    monkeypatch.setattr(export, "_convert_network", copy)
