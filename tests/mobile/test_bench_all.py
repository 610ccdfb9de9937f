"""`bench --all`: the same pictures by every runtime, and every mistake told in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pocketfusion.likeness import psnr


@pytest.fixture
def cache(tiny_folder: Path, tiny_bundle: Path, tmp_path: Path) -> Path:
    """Holds the tiny UNet as LiteRT's exporter would leave it: a conversion less."""
    from pocketfusion.mobile.export_settings import ExportSettings

    (tmp_path / "cache").mkdir()
    key = ExportSettings().conversion_key(tiny_folder, "unet")
    shutil.copyfile(tiny_bundle / "unet.tflite", tmp_path / "cache" / f"unet-{key}.tflite")
    return tmp_path / "cache"


def test_the_table(run, tiny_folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketfusion.contest import contenders

    monkeypatch.setattr(contenders.CONTENDERS["litert-gpu"], "packages", ("absent",))
    only, out = "litert-cpu:float32,litert-gpu:float32", tmp_path / "table.json"
    options = ("--only", only, "--cache", cache, "--threads", 1, "--runs", 2, "--steps", 2, "--json", out)
    code, printed, notes = run("bench", "--all", tiny_folder, *options)
    assert (code, notes) == (0, "")
    table = json.loads(out.read_text())
    torch, litert = table["rows"]
    assert (torch["name"], litert["name"]) == ("torch:float32", "litert-cpu:float32")
    assert torch["psnr_db"] == 100 and torch["ratio"] == 1 and litert["psnr_db"] > 50
    assert litert["size"] == next(cache.rglob("unet.tflite")).stat().st_size
    for row in table["rows"]:
        step = row["step_seconds"]
        assert step["count"] == 4 and 0 < step["min"] <= step["median"] <= step["max"] < row["load_seconds"]
        assert 0 < row["rss_before_loading"] < row["peak_rss"]
    assert litert["peak_rss"] < torch["peak_rss"] - 100e6  # it has loaded no torch
    assert list(table["left_out"]) == ["litert-gpu:float32"]
    assert "litert-gpu:float32 is left out: absent is not installed: pip install '.[compress]'" in printed
    assert (
        "2 steps of 2 pictures" in printed and "64×64, classifier-free guidance" in printed and "1 threads" in printed
    )


@pytest.mark.parametrize("kind", ["classifier-free", "embedded", "folded"])
def test_a_drawing_is_what_the_bundle_draws(
    kind: str, tiny_folder: Path, tiny_bundle: Path, guided: dict[str, tuple[Path, Path]]
) -> None:
    """The loop of the table, with PyTorch's UNet, against `generate`'s on LiteRT."""
    import torch

    from pocketfusion.contest.contenders import Subject
    from pocketfusion.contest.unet_subject import PROMPT, Drawing, Scene, open_unet
    from pocketfusion.runtime.pipeline import Pipeline

    folder, bundle = (tiny_folder, tiny_bundle) if kind == "classifier-free" else guided[kind]
    subject = Subject(str(folder), None, 1, "")
    scene, unet = Scene(subject, 3), open_unet(subject)[0]
    drawing = Drawing(scene, 7)
    for step in range(scene.steps):
        inputs = {name: torch.from_numpy(values) for name, values in drawing.call(step).items()}
        with torch.no_grad():
            drawing.take(step, unet(**inputs)["noise_pred"].numpy())
    drawn = Pipeline.load(bundle, 1).generate(PROMPT, seed=7, num_inference_steps=3).images[0]
    assert psnr(np.asarray(drawn), scene.picture(drawing.latents)) > 50


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--all", "FOLDER", "--only", "tflite:int8"), "--only has 'tflite:int8': choose among torch:float32"),
        (("--all", "FOLDER", "--size", "64"), "--size is '64'"),
        (("--all", "FOLDER", "--size", "60x64"), "multiples of"),
        (("--all", "FOLDER", "--runs", "0"), "number of runs is 0"),
        (("--all", "FOLDER", "--steps", "0"), "--steps is 0"),
        (("--all", "FOLDER", "--threads", "0"), "number of threads is 0"),
        (("--all", "BUNDLE"), "is a bundle, not a model folder"),
        (("BUNDLE", "--all", "FOLDER"), "--all compares runtimes on one model folder: leave"),
        (("BUNDLE", "--only", "torch:float32"), "--only is of bench --all FOLDER"),
    ],
)
def test_what_is_wrong_is_one_sentence(run, options, part: str, tiny_folder: Path, tiny_bundle: Path) -> None:
    places = {"FOLDER": tiny_folder, "BUNDLE": tiny_bundle}
    code, printed, notes = run("bench", *(places.get(one, one) for one in options))
    assert code == 2 and printed == "" and part in notes and notes.count("\n") == 1


def test_a_process_that_dies(tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketfusion.contest.contenders import REFERENCE, Subject
    from pocketfusion.contest.rounds import contest
    from pocketfusion.errors import PocketfusionError

    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(PocketfusionError, match="PyTorch cannot run .* here .its process ended with code 1: see if"):
        contest(Subject(str(tiny_folder), None, 1, str(cache)), (REFERENCE,), runs=1, steps=1)
