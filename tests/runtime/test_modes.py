"""Modes: the same pictures, other memory; what is loaded when; nothing hangs or stays when something fails."""

from __future__ import annotations

import json
import shutil
import threading

import numpy as np
import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.memory import memory, release
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import Cancelled, Pipeline
from pocketfusion.runtime.residency import MODES


def pictures(pipeline, **settings):
    result = pipeline.generate("a red apple", seed=1, num_inference_steps=3, **settings)
    return [image.tobytes() for image in result.images]


def test_all_modes_draw_the_same_bytes(tiny_bundle):
    drawn = {mode: pictures(Pipeline.load(tiny_bundle, 1, mode=mode), num_images=2) for mode in MODES}
    assert drawn["resident"] == drawn["pipelined"] == drawn["sequential"]
    again = Pipeline.load(tiny_bundle, 1, mode="pipelined")
    assert pictures(again, num_images=2) == pictures(again, num_images=2) == drawn["resident"]


def loading():
    """The threads that still load a network."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("load ")]


def timeline(path):
    """[(seconds, kind, network)] of a trace, the loads at their end and the frees at their beginning."""
    spans = json.loads(path.read_text())["spans"]
    return sorted((s["begin"] if s["kind"] == "free" else s["end"], s["kind"], s["network"]) for s in spans)


def held(events):
    """The sets of networks that were in memory, in order."""
    now, sets = set(), []
    for _, kind, network in events:
        if kind in ("load", "free"):
            now = now | {network} if kind == "load" else now - {network}
            sets.append(now)
    return sets


@pytest.mark.parametrize("images", [1, 2])
def test_what_is_in_memory_when(tiny_bundle, tmp_path, images):
    events = {}
    for mode in MODES:
        pipeline = Pipeline.load(tiny_bundle, 1, mode=mode, trace=tmp_path / f"{mode}.json")
        pictures(pipeline, num_images=images)
        pipeline.close()
        events[mode] = timeline(tmp_path / f"{mode}.json")
    assert held(events["resident"])[-1] == {"text_encoder", "unet", "decoder"}
    unet, text, decoder = {"unet"}, {"unet", "text_encoder"}, {"unet", "decoder"}
    assert held(events["pipelined"]) == [unet, text, unet, decoder, unet]
    assert held(events["sequential"]) == [{"text_encoder"}, set(), {"unet"}, set(), {"decoder"}, set()]
    # the text encoder is gone before the first step, and the decoder begins to load before the last picture's second
    spans = json.loads((tmp_path / "pipelined.json").read_text())["spans"]
    steps = [s for s in spans if s["kind"] == "run" and s["network"] == "unet"]
    (freed,) = (s["end"] for s in spans if s["kind"] == "free" and s["network"] == "text_encoder")
    (began,) = (s["begin"] for s in spans if s["kind"] == "load" and s["network"] == "decoder")
    assert len(steps) == 3 * images and freed <= steps[0]["begin"]
    assert began <= steps[-3]["end"] and (images == 1 or began >= steps[-4]["end"])


def test_unknown_mode_and_accelerator(tiny_bundle):
    with pytest.raises(PocketfusionError, match="the mode is 'fast': choose resident, pipelined or sequential"):
        Pipeline.load(tiny_bundle, 1, mode="fast")
    with pytest.raises(PocketfusionError, match="the accelerator is 'tpu': choose cpu or gpu"):
        Pipeline.load(tiny_bundle, 1, accelerator="tpu")


@pytest.mark.parametrize(
    ("failure", "match"),
    [
        (RuntimeError("no memory"), r"decoder could not be loaded while the UNet ran \(RuntimeError: no memory\)"),
        (PocketfusionError("decoder.tflite is bad: export it again"), "^decoder.tflite is bad: export it again$"),
    ],
)
def test_a_decoder_thread_that_fails(tiny_bundle, monkeypatch, failure, match):
    pipeline = Pipeline.load(tiny_bundle, 1, mode="pipelined")
    expected = pictures(pipeline)
    real, steps = Network.__init__, []

    def load(self, path, *arguments, **settings):
        if path.name == "decoder.tflite":
            assert threading.current_thread() is not threading.main_thread()
            raise failure
        real(self, path, *arguments, **settings)

    monkeypatch.setattr(Network, "__init__", load)
    with pytest.raises(PocketfusionError, match=match):
        pipeline.generate("cat", num_inference_steps=500, callback=lambda *step: steps.append(step))
    assert len(steps) < 500  # it is told while the UNet still has steps to do
    assert not loading()
    monkeypatch.undo()
    assert pictures(pipeline) == expected  # and the pipeline still works


def test_a_cancelled_picture_leaves_no_decoder(tiny_bundle):
    pipeline = Pipeline.load(tiny_bundle, 1, mode="pipelined")
    with pytest.raises(Cancelled):
        pipeline.generate("cat", num_inference_steps=3, callback=lambda *step: False)
    assert set(pipeline._networks._networks) == {"unet"} and not loading()


def test_previews_by_mode(tiny_bundle):
    for mode in ("resident", "pipelined"):
        pipeline, seen = Pipeline.load(tiny_bundle, 1, mode=mode), []
        pictures(pipeline, callback=lambda k, t, z: seen.append(pipeline.decode(z)))  # noqa: B023
        assert [image.size for image in seen] == [(64, 64)] * 3
    pipeline = Pipeline.load(tiny_bundle, 1, mode="sequential")
    with pytest.raises(PocketfusionError, match="mode is sequential and the UNet is in memory, so the decoder cannot"):
        pictures(pipeline, callback=lambda k, t, z: pipeline.decode(z))
    assert pipeline.decode(pipeline.noise(0)).size == (64, 64)  # nothing else is in use now


def test_a_full_disk_for_packed_weights(tiny_bundle, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 0))
    Pipeline.load(tiny_bundle, 1, mode="resident")
    with pytest.raises(PocketfusionError, match="packed weights need up to .* MB in .* 0 MB free: set TMPDIR"):
        Pipeline.load(tiny_bundle, 1, mode="pipelined")


@pytest.mark.skipif(memory() is None, reason="the system does not tell a process's memory")
def test_mapped_weights_leave_the_heap_and_freed_means_freed():
    bundle = Bundle.open(embedded_bundle(), verify=False)
    spec = bundle.manifest.networks.unet
    rng = np.random.default_rng(0)
    inputs = {t.name: rng.standard_normal(t.shape).astype(t.dtype) for t in spec.inputs}
    grown, left, outputs = {}, {}, {}
    for mapped in (False, True, False, True):  # the first of each also loads libraries
        release()
        before = memory().anon
        network = Network(bundle.file("unet"), spec, 1, mapped=mapped)
        outputs[mapped] = network(**inputs)
        grown[mapped] = memory().anon - before
        network.close()
        left[mapped] = memory().anon - before
    assert (outputs[False] == outputs[True]).all()
    packed = 4 * spec.parameters  # XNNPACK's float32 copy of the int8 weights, beside the unpacked ones
    assert grown[False] > 1.8 * packed and grown[True] < 1.4 * packed
    assert max(left.values()) < 0.15 * packed


def test_quiet_blocks_may_overlap_in_threads(capfd):
    import os

    inside, leave = threading.Event(), threading.Event()

    def other():
        with quiet():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        inside.wait(10)
    os.write(2, b"hidden\n")  # the thread is still inside
    leave.set()
    thread.join()
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"
