"""A copy of the tiny folder that may be altered, and conversion replaced by `tiny_bundle`'s files (minutes saved)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
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


@pytest.fixture(scope="session")
def guided(once: Callable, tiny_bundle: Path) -> dict[str, tuple[Path, Path]]:
    """Folder and bundle whose UNet has embedded or folded guidance (tests/guided.py). Read only.

    Only the UNets are converted, for one row: the other networks are the tiny bundle's own.
    """
    root = once("guided", lambda root: _make_guided(root, tiny_bundle))
    return {kind: (root / kind, root / f"{kind}-bundle") for kind in ("embedded", "folded")}


def _make_guided(root: Path, tiny_bundle: Path) -> None:
    from guided import make_guided_folder
    from pocketfusion.mobile import export

    convert = export._convert_network

    def write(wrapped: Any, samples: Any, file: Path, settings: Any) -> None:
        network = file.name.partition("-")[0]
        if network == "unet":
            convert(wrapped, samples, file, settings)
        else:
            shutil.copyfile(tiny_bundle / f"{network}.tflite", file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_convert_network", write)
        for kind in ("embedded", "folded"):
            make_guided_folder(root / kind, kind)
            export.export(root / kind, root / f"{kind}-bundle", name=kind)


@pytest.fixture
def converted(guided: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`converted(kind)`: from then on `export` copies that guided bundle's networks instead of converting."""
    from pocketfusion.mobile import export

    def use(kind: str) -> None:
        def copy(module: Any, samples: Any, file: Path, settings: Any) -> None:
            shutil.copyfile(guided[kind][1] / f"{file.name.partition('-')[0]}.tflite", file)

        monkeypatch.setattr(export, "_convert_network", copy)

    return use
