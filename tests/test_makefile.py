"""`make demo` installs what the sources are now; an old Python is told; the links of a release are whole."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]


def dry_run(clone: Path) -> str:
    return subprocess.run(["make", "-n", "demo"], cwd=clone, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in miniature, an hour old, that `make demo` has run in half an hour ago."""
    package = tmp_path / "src" / "pocketfusion"
    (package / "bundles").mkdir(parents=True)
    page = package / "serve" / "page" / "index.html.gz"
    built = (page, tmp_path / "web" / "node_modules" / ".package-lock.json", tmp_path / ".venv-demo" / "ready")
    sources = (package / "info.py", package / "bundles" / "bundle.json", tmp_path / "web" / "package-lock.json")
    for file in (*sources, tmp_path / "web" / "index.html", *built):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        age(path, 60)
    for file, minutes in zip(built, (35, 40, 30), strict=True):
        age(file, minutes)
    return tmp_path


def age(path: Path, minutes: float) -> None:
    now = path.stat().st_ctime
    os.utime(path, (now - 60 * minutes,) * 2)


@pytest.mark.parametrize(
    "change",
    [
        lambda clone: (clone / "src/pocketfusion/info.py").write_text("x = 1\n"),
        lambda clone: (clone / "src/pocketfusion/bundles/bundle.json").write_text("{}"),
        lambda clone: (clone / "src/pocketfusion/bundles/bundle.json").unlink(),
        lambda clone: (clone / "src/pocketfusion/new.py").touch(),
        lambda clone: (clone / "pyproject.toml").touch(),
        lambda clone: (clone / "Makefile").touch(),
    ],
    ids=["a module", "data", "a file less", "a file more", "dependencies", "how it is made"],
)
def test_a_change_is_installed(clone: Path, change: Callable[[Path], object]) -> None:
    assert "pip install" not in dry_run(clone)
    change(clone)
    said = dry_run(clone)
    assert "rm -rf build/lib" in said and "pip install" in said  # what was removed would else come from build/
    assert "npm" not in said


@pytest.mark.skipif(shutil.which("npm") is None, reason="without npm no page is built")
def test_a_change_of_the_page_is_built_and_installed(clone: Path) -> None:
    assert "npm" not in dry_run(clone)
    (clone / "web" / "index.html").touch()
    said = dry_run(clone)
    assert "npm run" in said and "npm ci" not in said and "pip install" in said
    (clone / "web" / "package-lock.json").touch()
    assert "npm ci" in dry_run(clone)


def test_what_python_and_pip_leave_behind_is_no_change(clone: Path) -> None:
    for name in ("__pycache__", "../pocketfusion.egg-info"):
        (clone / "src" / "pocketfusion" / name).mkdir()
        (clone / "src" / "pocketfusion" / name / "x").touch()
    for folder in (clone / "src", clone / "src" / "pocketfusion"):
        age(folder, 60)
    assert "pip install" not in dry_run(clone)


def test_it_says_how_to_type_pocketfusion(clone: Path) -> None:
    assert ". .venv-demo/bin/activate" in dry_run(clone)


@pytest.mark.parametrize("target", ["demo", "test", "site"])
def test_a_python_that_is_too_old_is_told_before_anything_is_installed(clone: Path, target: str) -> None:
    old = clone / "python3.8"
    old.write_text(
        f"#!/bin/sh\nshift; exec {sys.executable} -c "
        '\'import sys; sys.version_info = (3, 8, 1); sys.version = "3.8.1 (old)"; exec(sys.argv[1])\' "$@"\n'
    )
    old.chmod(0o755)
    shutil.rmtree(clone / ".venv-demo")
    done = subprocess.run(["make", target, f"PYTHON={old}"], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"{old} is 3.8.1: name another by PYTHON=python3.1" in done.stderr
    assert not [path for path in clone.iterdir() if path.name.startswith(".venv")]


def test_a_release_has_no_link_that_leads_nowhere_on_an_index(tmp_path: Path) -> None:
    for name in ("README.md", "pyproject.toml", "docs", "examples", "runs", "LICENSE", "NOTICE"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    command = [sys.executable, ROOT / ".ci" / "absolute_links.py", tmp_path, "https://example.org/pf/"]
    subprocess.run(command, check=True)
    targets = re.findall(r"\]\(([^)]+)\)", (tmp_path / "README.md").read_text())
    assert len(targets) > 20 and [one for one in targets if not one.startswith(("https://", "http://", "#"))] == []
    assert any("/raw/v" in one and one.endswith(".png") for one in targets)
    with (tmp_path / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["urls"]["Repository"] == "https://example.org/pf"
    (tmp_path / "README.md").write_text("[x](docs/no.md)")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "leads to docs/no.md, which is not there" in done.stderr
