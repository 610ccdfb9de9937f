"""Fixtures shared by all tests: one tiny model folder and the bundle the real exporter makes of it, built once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed data set of 72 captioned 64-px squares and discs in all splits. Read only."""
    from shapes import make_shapes

    return make_shapes(tmp_path_factory.mktemp("shapes") / "data")


@pytest.fixture(scope="session")
def tiny_recipe(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """recipes/tiny.yaml with the tiny folder's text encoder."""
    import yaml

    recipe = yaml.safe_load((ROOT / "recipes" / "tiny.yaml").read_text())
    recipe["text"] = {"source": str(tiny_folder), "max_length": 32}
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def cli():
    """Runs `pocketfusion ARGS` in a process of its own and returns it, with its output as text."""

    def run(*arguments: object, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pocketfusion", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env={**os.environ, **environment}
        )

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path, tiny_data: Path, cli) -> Path:
    """What the training commands make of the tiny recipe, once: folders autoencoder, judge and base. Read only."""
    root = tmp_path_factory.mktemp("trained")
    for command, out, more in (
        ("train-autoencoder", "autoencoder", ()),
        ("train-judge", "judge", ()),
        ("train-teacher", "base", ("--autoencoder", root / "autoencoder")),
    ):
        done = cli(command, tiny_recipe, "--data", tiny_data, "--out", root / out, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "finished" in done.stdout and "UNEXPECTED" not in done.stdout + done.stderr
    return root
