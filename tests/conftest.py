"""Fixtures shared by all tests: one tiny model folder and the bundle the real exporter makes of it, built once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model folder. Read only: a test that alters it copies it first."""
    from tiny import make_tiny_folder

    return make_tiny_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder's fp32 bundle, made by the real exporter. Read only, as above."""
    from pocketfusion.mobile.export import export

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_folder, out, name="tiny")
    return out
