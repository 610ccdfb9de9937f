"""Traces: the spans and samples in the file, the picture beside it, and outputs that cannot be written."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from pocketfusion.runtime import trace as tracing
from pocketfusion.runtime.memory import memory
from pocketfusion.runtime.pipeline import Pipeline


def test_a_trace_and_its_picture(run, tiny_bundle, tmp_path):
    code, printed, _ = run(
        *("generate", "cat", "-o", tmp_path / "a.png", "--bundle", tiny_bundle, "--steps", 4, "--threads", 1),
        *("--mode", "pipelined", "--trace", tmp_path / "trace.json"),
    )
    assert code == 0 and str(tmp_path / "trace.json") in printed and str(tmp_path / "trace.png") in printed
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert (trace["mode"], trace["bundle"], trace["prompt"], trace["steps"]) == ("pipelined", "tiny", "cat", 4)
    runs = [span for span in trace["spans"] if span["kind"] == "run" and span["network"] == "unet"]
    assert [span["step"] for span in runs] == [1, 2, 3, 4]
    assert all(span["begin"] <= span["end"] for span in trace["spans"])
    assert [s["begin"] for s in trace["spans"]] == sorted(s["begin"] for s in trace["spans"])
    assert Image.open(tmp_path / "trace.png").size == (tracing.WIDTH, tracing.HEIGHT)


@pytest.mark.skipif(memory() is None, reason="the system does not tell a process's memory")
def test_samples_are_this_process_s_on_the_spans_clock(tiny_bundle, tmp_path):
    pipeline = Pipeline.load(tiny_bundle, 1, trace=tmp_path / "t.json")
    ballast = []

    def grow(step, timestep, latents):
        if step == 200:
            ballast.append(np.ones(50_000_000, np.uint8))

    pipeline.generate("cat", num_inference_steps=400, callback=grow)
    pipeline.close()
    trace = json.loads((tmp_path / "t.json").read_text())
    samples = trace["memory"]
    assert len(samples) > 10
    end = max(span["end"] for span in trace["spans"])
    assert 0 <= samples[0]["seconds"] <= samples[-1]["seconds"] <= end + 1
    step = next(s for s in trace["spans"] if s.get("step") == 201)["end"]
    before = max(s["anon"] for s in samples if s["seconds"] < step)
    after = samples[-1]["anon"]
    assert 45e6 < after - before < 60e6 and len(ballast[0])


def test_a_trace_that_cannot_be_written(run, tiny_bundle, tmp_path):
    (tmp_path / "folder.json").mkdir()
    out = tmp_path / "a.png"
    for file, part in (
        (tmp_path / "no" / "t.json", "does not exist"),
        ("/proc/t.json", "cannot write into /proc"),
        (tmp_path / "folder.json", "is a folder"),
        (tmp_path / "t.txt", "ends in .json"),
    ):
        code, printed, notes = run("generate", "cat", "-o", out, "--bundle", tiny_bundle, "--trace", file)
        assert code == 2 and printed == "" and part in notes and notes.count("\n") == 1
        assert not out.exists()


def test_the_sampler_ends_with_the_pipeline(tiny_bundle, tmp_path):
    pipeline = Pipeline.load(tiny_bundle, 1, trace=tmp_path / "t.json")
    pid = pipeline.trace._sampler.pid
    os.kill(pid, 0)
    pipeline.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def colours(image, box):
    return {color for _, color in image.crop(box).getcolors(1 << 20)}


def test_the_picture_shows_where_and_when(tmp_path):
    """A UNet that is there in the second half of the time only, and memory that doubles there."""
    spans = [
        {"kind": "load", "network": "unet", "begin": 0.5, "end": 0.5},
        {"kind": "run", "network": "unet", "begin": 0.75, "end": 1.0, "step": 1},
    ]
    samples = [(0.0, 100), (0.5, 100), (0.5, 200), (1.0, 200)]
    record = {
        **{"bundle": "b", "mode": "pipelined", "steps": 1, "spans": spans},
        "memory": [{"seconds": t, "anon": mb * 10**6, "file": 0} for t, mb in samples],
    }
    tracing.draw(record, tmp_path / "p.png")
    image = Image.open(tmp_path / "p.png").convert("RGB")
    left, right, top = tracing._LEFT, tracing.WIDTH - tracing._RIGHT, tracing._TOP
    middle, upper = (left + right) // 2, (top + 60, top + 180)
    blue = tuple(bytes.fromhex(tracing._ANON[1:]))
    assert blue not in colours(image, (left, upper[0], middle - 5, upper[1]))
    assert blue in colours(image, (middle + 5, upper[0], right, upper[1]))
    lane = top + tracing._CHART + 30 + tracing._LANE + tracing._GAP
    there, running = (tuple(bytes.fromhex(c[1:])) for c in tracing._LANES["unet"][:0:-1])
    box = (lane + 10, lane + tracing._LANE - 12)
    assert not {there, running} & colours(image, (left, box[0], middle - 8, box[1]))
    quarter = (middle + right) // 2
    assert there in colours(image, (middle + 8, box[0], quarter - 8, box[1]))
    assert running in colours(image, (quarter + 8, box[0], right - 8, box[1]))


def test_a_picture_without_samples(tmp_path):
    record = {"bundle": "b", "mode": "resident", "steps": 1, "spans": [], "memory": []}
    tracing.draw(record, tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size == (tracing.WIDTH, tracing.HEIGHT)
