"""`pocketfusion bench`: the rows, what is printed under them, and every mistake told in a sentence."""

from __future__ import annotations

import json
import shutil

import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.bench import Settings, bench


@pytest.fixture(scope="module")
def rows(tiny_bundle, tmp_path_factory):
    """Two bundles in turns: the tiny one, and a copy of another name."""
    other = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bench") / "other")
    drawn = []
    return bench([tiny_bundle, other], Settings(runs=2, threads=1, steps=3), lambda: drawn.append(1)), drawn


def test_rows(rows):
    (first, second), drawn = rows
    assert len(drawn) == 2 * 3  # one unmeasured round and two measured
    assert first["path"].endswith("tiny") and second["path"].endswith("other")
    for row in (first, second):
        times = row["seconds"]
        assert times["open"] > 0 and times["compile"] > 0
        assert times["step"]["count"] == 6 and times["decode"]["count"] == times["total"]["count"] == 2
        for name in ("text", "step", "decode", "total"):
            assert 0 < times[name]["min"] <= times[name]["median"] <= times[name]["max"]
        assert times["total"]["min"] > times["text"]["min"] + 3 * times["step"]["min"] + times["decode"]["min"]
        assert row["peak_rss"] > 20e6 and row["threads"] == 1 and row["mode"] == "resident"
        assert (row["num_inference_steps"], row["guidance"], row["unet_batch"]) == (3, "classifier-free", 2)
        assert row["cpu"] and row["runtime"].startswith("ai-edge-litert ") and row["image_size"] == [64, 64]
    medians = [row["seconds"]["total"]["median"] for row in (first, second)]
    assert first["ratio"] == 1 and second["ratio"] == pytest.approx(medians[0] / medians[1])


def test_the_command_prints_the_protocol(run, tiny_bundle, tmp_path):
    out = tmp_path / "bench.json"
    code, printed, notes = run("bench", tiny_bundle, "--runs", 1, "--threads", 1, "--steps", 2, "--json", out)
    assert (code, notes) == (0, "")
    for part in ("median of 1 pictures", "after one unmeasured", "Energy: not measured.", "1 threads", "UNet batch 2"):
        assert part in printed
    assert (
        "2 steps, classifier-free guidance" in printed and "ai-edge-litert" in printed and "mode resident" in printed
    )
    assert all(name in printed for name in ("load", "compile", "text", "step", "decode", "total", "peak RSS"))
    written = json.loads(out.read_text())
    assert written["energy"] is None and written["runs"] == 1 and len(written["bundles"]) == 1


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--runs", 0), "number of runs is 0"),
        (("--mode", "quick"), "the mode is 'quick'"),
        (("--json", "/proc/a.json"), "cannot write into /proc"),
    ],
)
def test_settings_out_of_range(run, tiny_bundle, options, part):
    code, printed, notes = run("bench", tiny_bundle, *options)
    assert code == 2 and printed == "" and part in notes and notes.count("\n") == 1


def test_what_a_child_finds_wrong_is_told(tiny_bundle, bundle, tmp_path):
    with pytest.raises(PocketfusionError, match="the number of steps is 0"):
        bench([tiny_bundle], Settings(runs=1, threads=1, steps=0))
    with pytest.raises(PocketfusionError, match="there is no bundle at"):
        bench([tiny_bundle, tmp_path / "no"], Settings(runs=1))
    file = bundle / "unet.tflite"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(PocketfusionError, match="unet.tflite is altered"):
        bench([bundle], Settings(runs=1))


def test_a_child_that_dies(tiny_bundle, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(PocketfusionError, match="the process that ran .*tiny ended with code 1: see if memory"):
        bench([tiny_bundle], Settings(runs=1))
