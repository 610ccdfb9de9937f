"""Packed weights that are kept: the same bytes, found again, never those of another build or processor."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime import networks
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.networks import KeptWeights
from pocketfusion.runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(embedded_bundle(), verify=False)


@pytest.fixture
def decode(bundle: Bundle, tmp_path: Path):
    """Loads the embedded decoder with packed weights kept in `tmp_path / "kept"`, and decodes."""
    spec = bundle.manifest.networks.decoder
    latents = np.ones(spec.inputs[0].shape, np.float32)

    def run(folder: Path | None = tmp_path / "kept") -> bytes:
        kept = None if folder is None else KeptWeights(folder)
        network = networks.Network(
            bundle.file("decoder"), spec, 1, kept=kept, sha256=bundle.manifest.files["decoder"].sha256
        )
        result = network(latents=latents).tobytes()
        network.close()
        return result

    return run


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Name, inode and time of what `folder` holds."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_the_next_start_finds_them_and_draws_the_same_bytes(decode, tmp_path):
    plain, first = decode(None), decode()
    before = files(tmp_path / "kept")
    assert len(before) == 1 and next(iter(before)).endswith(".packed")
    assert plain == first == decode()
    assert files(tmp_path / "kept") == before


def test_those_of_another_build_or_processor_are_replaced(decode, tmp_path, monkeypatch):
    monkeypatch.setattr(KeptWeights, "_machine", staticmethod(lambda: "0" * 16))
    drawn = decode()
    (other,) = (tmp_path / "kept").iterdir()
    other.write_bytes(bytes(other.stat().st_size))  # would draw noise, or nothing, if they were used
    monkeypatch.undo()
    assert decode() == drawn
    (now,) = (tmp_path / "kept").iterdir()
    assert now.name != other.name


def test_the_processor_and_the_build_are_in_the_name(monkeypatch, tmp_path):
    here = KeptWeights._machine()
    assert here == KeptWeights._machine()
    monkeypatch.setattr(networks.platform, "machine", lambda: "another")
    assert KeptWeights._machine() != here
    monkeypatch.undo()
    (tmp_path / "libLiteRt.so").write_bytes(b"another")
    monkeypatch.setattr(networks.ai_edge_litert, "__file__", str(tmp_path / "__init__.py"))
    assert KeptWeights._machine() != here


def test_a_file_that_was_cut_short_is_made_anew(decode, tmp_path):
    drawn = decode()
    (file,) = (tmp_path / "kept").iterdir()
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.truncate(size // 2)
    assert decode() == drawn
    (file,) = (tmp_path / "kept").iterdir()
    assert file.stat().st_size == size


@pytest.mark.parametrize("case", ["a file", "a folder in a file", "no room"])
def test_what_cannot_be_kept_is_done_without(decode, tmp_path, monkeypatch, case):
    folder = tmp_path / "kept"
    if case == "no room":
        monkeypatch.setattr(networks, "packed_size", lambda spec: 1 << 62)
    else:
        folder.write_text("")
    assert decode(folder / "below" if case == "a folder in a file" else folder) == decode(None)
    assert not folder.is_dir() or os.listdir(folder) == []


@pytest.mark.parametrize("mode", ["resident", "sequential"])
def test_a_pipeline_keeps_all_three(tiny_bundle, tmp_path, mode):
    drawn = []
    for cache in (None, tmp_path, tmp_path):
        pipeline = Pipeline.load(tiny_bundle, 1, mode=mode, cache=cache)
        drawn.append(pipeline.generate("a red apple", seed=1, num_inference_steps=2).images[0].tobytes())
        pipeline.close()
    assert drawn[0] == drawn[1] == drawn[2] and len(list(tmp_path.iterdir())) == 3


def test_numbers_that_are_not_finite_may_be_of_the_kept_weights(bundle, tmp_path):
    def draw() -> None:
        pipeline = Pipeline.load(bundle.path, 1, cache=tmp_path)
        pipeline.generate("a red apple", seed=1, num_inference_steps=1)
        pipeline.close()

    draw()
    (file,) = tmp_path.glob(f"{bundle.manifest.files['unet'].sha256[:32]}*")
    with file.open("r+b") as packed:  # of the size that it had
        packed.seek(4096)
        packed.write(b"\xff" * (1 << 20))
    with pytest.raises(PocketfusionError, match=f"too high, or the weights kept in {tmp_path} are damaged: empty"):
        draw()
