"""examples/cpp: built with g++ against the wheel's library, it gives Python's token ids, noise and pictures."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pocketfusion.port.device_pack import SOURCES
from pocketfusion.port.vectors import UNICODE
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.pipeline import Pipeline


@pytest.fixture(scope="session")
def draw(once: Callable) -> Path:
    """The program, built as the page says but for the time that optimising takes."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed (apt-get install g++)")
    found = importlib.util.find_spec("ai_edge_litert")
    assert found and found.submodule_search_locations
    litert = Path(found.submodule_search_locations[0])

    def make(folder: Path) -> None:
        command = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-o", "draw"]
        command += [*map(str, sorted(SOURCES.glob("*.cpp"))), str(litert / "libLiteRt.so"), f"-Wl,-rpath,{litert}"]
        subprocess.run(command, cwd=folder, check=True, timeout=540)

    return once("cpp", make) / "draw"


def drawn(program: Path, out: Path, bundle: Path, prompt: str, seed: int, *asked: object) -> tuple[np.ndarray, dict]:
    arguments = [bundle, UNICODE, prompt, seed, out, *(("cpu", *asked) if asked else ())]
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        assert image.mode == "RGB"
        return np.asarray(image), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("prompt", "seed", "asked"),
    [
        ("a red apple, noto style", 3, ()),
        ("ΣΊΣΥΦΟΣ 苹果 🍎 crème", 2**32 - 1, ("euler-ancestral", 3)),
        ("two dogs", 7, ("dpmpp-2m-karras", 4)),
        ("a cat", 12, ("tcd", 3)),
    ],
)
def test_the_embedded_bundle(
    draw: Path, embedded: Pipeline, prompt: str, seed: int, asked: tuple, tmp_path: Path
) -> None:
    sampler, steps = asked or (None, None)
    pixels, said = drawn(draw, tmp_path / "a.png", embedded_bundle(), prompt, seed, *asked)
    result = embedded.generate(prompt, seed=seed, sampler=sampler, num_inference_steps=steps)
    np.testing.assert_array_equal(pixels, np.asarray(result.images[0]))
    assert len(said["unet"]["run_ms"]) == (steps or 8) and said["decoder"]["where"] == "cpu"


@pytest.mark.parametrize("form", ["outside", "single", "folded", "embedded"])
def test_every_form(draw: Path, form: str, forms: dict[str, Path], tmp_path: Path) -> None:
    pixels, _ = drawn(draw, tmp_path / "a.png", forms[form], "a red cat", 11, "ddim", 3)
    result = Pipeline.load(forms[form], 1).generate("a red cat", seed=11, sampler="ddim", num_inference_steps=3)
    np.testing.assert_array_equal(pixels, np.asarray(result.images[0]))


def test_token_ids(draw: Path, tokenizers: list[tuple[Path, list[dict]]]) -> None:
    """WordPiece and byte pairs, with learnt tokens."""
    for folder, rows in tokenizers:
        prompts = json.dumps([row["prompt"] for row in rows])
        command = [draw, "--tokens", folder, UNICODE]
        done = subprocess.run(command, input=prompts, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        for row, ours in zip(rows, json.loads(done.stdout), strict=True):
            assert ours == [row["ids"], row["count"]], (folder, row["prompt"])


def test_what_it_cannot_do_is_one_sentence(draw: Path, forms: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(forms["outside"], tmp_path / "bundle"))
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "decoder.tflite").unlink()
    for change, arguments, said in (
        ({}, ("1", "a.png"), "decoder.tflite"),
        ({"files": {}}, ("1", "a.png"), 'the JSON lacks "'),
        ({"sampler": "plms"}, ("1", "a.png"), "the sampler plms is not known"),
        ({}, ("1",), "usage:"),
    ):
        (bundle / "bundle.json").write_text(json.dumps(manifest | change))
        command = [draw, bundle, UNICODE, "a cat", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        lines = [line for line in done.stderr.splitlines() if line.startswith(("error", "usage"))]
        assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.stderr
    assert not (tmp_path / "a.png").exists()
    assert Bundle.open(forms["outside"])


def test_cmake_puts_the_program_where_the_page_says(tmp_path: Path) -> None:
    """build/draw, of examples/README.md; only configured, as building takes as long as the fixture."""
    if shutil.which("cmake") is None or shutil.which("make") is None:
        pytest.skip("cmake or make is not installed (apt-get install cmake make)")
    examples = SOURCES.parents[3] / "examples"
    page = (examples / "README.md").read_text()
    assert "cmake -S examples/cpp -B build" in page and "\nbuild/draw my-bundle" in page
    command = ["cmake", "-G", "Unix Makefiles", "-S", examples / "cpp", "-B", tmp_path / "build"]
    subprocess.run([*map(str, command), f"-DLITERT={tmp_path}"], check=True, capture_output=True, timeout=120)
    (link,) = (tmp_path / "build").rglob("draw.dir/link.txt")
    words = link.read_text().split()
    assert (link.parents[2] / words[words.index("-o") + 1]).resolve() == tmp_path / "build" / "draw"
