"""The page in Chromium: its looks with a made-up engine, itself as `serve` gives it, and as a static site."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pocketfusion
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.output import png_text, save_png
from pocketfusion.serve.site import bundle_entries, page_entries, page_folder, write_site

#: Of a picture's values between the browser's kernels and Python's.
CLOSE = 2


@pytest.fixture(scope="session")
def built(packages: Path) -> Path:
    """The page inside the package; built here unless it is there."""
    page = Path(pocketfusion.__file__).parent / "serve" / "page"
    if not (page / "index.html.gz").is_file():
        subprocess.run(["npm", "run", "--silent", "build"], cwd=packages, check=True, timeout=300)
    return page


@contextmanager
def served(built: Path, *bundles: Path) -> Iterator[str]:
    """The address of the command itself, on a free port."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(built / "none")}  # no WebGPU form of an earlier run
    command = [sys.executable, "-m", "pocketfusion", "serve", "--port", "0", *map(str, bundles)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        try:
            yield next(line.strip() for line in serving.stdout if line.startswith("http"))
        finally:
            serving.terminate()
            serving.wait(30)


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    with served(built) as address:
        yield address


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the page is given, and what it gives back: a picture of `generate`, an altered and a newer bundle."""
    root = tmp_path_factory.mktemp("page")
    pipeline = pocketfusion.load()
    result = pipeline.generate("a heart, fluent 3d style", seed=11, num_inference_steps=4, sampler="euler")
    save_png(result.images[0], root / "from-python.png", png_text(pipeline, result, 0))
    for name in ("altered", "newer"):
        shutil.copytree(embedded_bundle(), root / name)
    decoder = root / "altered" / "decoder.tflite"
    content = bytearray(decoder.read_bytes())
    content[len(content) // 2] ^= 1
    decoder.write_bytes(content)
    manifest = root / "newer" / "bundle.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    return root


def test_its_words_and_which_form_it_takes(vitest: Callable, tmp_path) -> None:
    vitest("tests/ui/library.test.ts", POCKETFUSION_VECTORS=str(tmp_path))


def test_its_looks_and_manners(vitest: Callable, chromium: str, tmp_path) -> None:
    vitest("tests/ui/looks.test.ts", POCKETFUSION_VECTORS=str(tmp_path))


def test_it_draws_keeps_and_works_offline(vitest: Callable, chromium: str, address: str, folder: Path) -> None:
    vitest("tests/ui/real.test.ts", POCKETFUSION_VECTORS=str(folder), POCKETFUSION_PAGE=address)
    pipeline = pocketfusion.load()
    result = pipeline.generate("a red apple, noto style", seed=3)
    check(folder / "from-page.png", result.images[0], png_text(pipeline, result, 0))
    again = Image.open(folder / "again-from-python.png")
    check(folder / "from-python.png", again, again.text)


def check(file: Path, picture: Image.Image, text: dict) -> None:
    """The file is the picture but for rounding, with the settings that `text` has."""
    found = Image.open(file)
    assert {**found.text, "Software": ""} == {key: str(value) for key, value in text.items()} | {"Software": ""}
    assert np.abs(np.asarray(found, int) - np.asarray(picture, int)).max() <= CLOSE


@pytest.mark.slow  # shaders on a CPU; what it adds to the engine's own test is the page's choice
def test_it_takes_a_gpu_and_the_form_for_it(
    vitest: Callable, chromium: str, built: Path, drawn: Path, tmp_path: Path
) -> None:
    with served(built, drawn / "outside", drawn / "gpu") as address:
        vitest("tests/ui/webgpu.test.ts", POCKETFUSION_VECTORS=str(tmp_path), POCKETFUSION_PAGE=address)
    pipeline = pocketfusion.load(drawn / "gpu")
    result = pipeline.generate("a red cat", negative_prompt="blue", seed=11, num_inference_steps=2)
    check(tmp_path / "from-gpu.png", result.images[0], png_text(pipeline, result, 0))


@pytest.mark.slow  # half a minute: another first visit
def test_a_static_site_isolates_itself(vitest: Callable, chromium: str, built: Path, tmp_path) -> None:
    entries = [*page_entries(page_folder()), *bundle_entries([Bundle.open(embedded_bundle())])]
    write_site(entries, tmp_path / "site")
    vitest("tests/ui/host.test.ts", POCKETFUSION_VECTORS=str(tmp_path), POCKETFUSION_SITE=str(tmp_path / "site"))
