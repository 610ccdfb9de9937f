"""Memory budgets: the mode that is chosen, what is refused, and that a process keeps to what was promised."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime import budget
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.memory import memory
from pocketfusion.runtime.pipeline import Pipeline

MB = 10**6
pytestmark = pytest.mark.skipif(memory() is None, reason="the system does not tell a process's memory")


@pytest.fixture
def measured(bundle, monkeypatch):
    """A bundle whose networks hold 300, 800 and 200 MB."""
    sizes = {"text_encoder": 300 * MB, "unet": 800 * MB, "decoder": 200 * MB}
    monkeypatch.setattr(budget, "estimate", lambda file: sizes[file.stem])
    return Bundle.open(bundle)


def test_the_fastest_mode_that_fits(measured):
    assert budget.held(measured) == {"text_encoder": 300 * MB, "unet": 800 * MB, "decoder": 200 * MB}
    needs = {mode: value / MB for mode, value in budget.needed(measured).items()}
    base = needs["sequential"] - 800
    assert needs["pipelined"] == pytest.approx(base + 1100, abs=1)
    files = sum(measured.manifest.files[name].size for name in ("text_encoder", "unet", "decoder"))
    assert needs["resident"] == pytest.approx(base + 1300 + files / MB, abs=1)
    for mode, need in needs.items():
        assert budget.choose_mode(measured, need + 5) == mode
        with pytest.raises(PocketfusionError, match=f"the mode {mode} needs about"):
            budget.choose_mode(measured, need - 5, mode)
        assert budget.choose_mode(measured, need + 5, mode) == mode


def test_what_cannot_fit_is_refused(measured):
    with pytest.raises(
        PocketfusionError, match=r"is 500 MB, but the largest network \(unet\) alone holds about 800 MB"
    ):
        budget.choose_mode(measured, 500)
    with pytest.raises(PocketfusionError, match="the mode resident needs about .*: choose --mode sequential or allow"):
        budget.choose_mode(measured, budget.needed(measured)["sequential"] / MB + 5, "resident")
    for wrong in (0, -3, float("nan"), float("inf")):
        with pytest.raises(PocketfusionError, match="the memory budget is .* MB: choose a positive number"):
            budget.choose_mode(measured, wrong)


def test_pipeline_takes_the_mode_that_the_budget_chooses(tiny_bundle):
    assert Pipeline.load(tiny_bundle, 1, memory_budget=100_000).mode == "resident"
    assert Pipeline.load(tiny_bundle, 1, memory_budget=100_000, mode="sequential").mode == "sequential"


def test_the_command_refuses_a_budget_below_the_largest_network(run, tiny_bundle, tmp_path):
    out = tmp_path / "a.png"
    code, printed, notes = run("generate", "cat", "-o", out, "--bundle", tiny_bundle, "--memory-budget", 20)
    assert code == 2 and printed == "" and not out.exists()
    assert notes.startswith("error: the memory budget is 20 MB, but the largest network") and notes.count("\n") == 1


CHILD = """
import json, sys
from pocketfusion.runtime.budget import needed, held
from pocketfusion.runtime.manifest import Bundle, embedded_bundle
from pocketfusion.runtime.memory import memory, peak_rss
from pocketfusion.runtime.pipeline import Pipeline
mode = sys.argv[1]
for _ in range(2):  # the first one also imports what estimates
    need = needed(Bundle.open(embedded_bundle(), verify=False))[mode]
pipeline = Pipeline.load(None, 1, memory_budget=need / 1e6 + 8)
assert pipeline.mode == mode, pipeline.mode
for _ in range(3):
    pipeline.generate("a red apple", seed=0, num_inference_steps=2)
print(json.dumps({"need": need, "peak": peak_rss()}))
"""


@pytest.mark.parametrize("mode", ["resident", "pipelined", "sequential"])
def test_a_process_keeps_to_its_budget(mode):
    done = subprocess.run([sys.executable, "-c", CHILD, mode], capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert 0.7 * told["need"] < told["peak"] < told["need"] + 8 * MB, told


def test_the_estimate_counts_packed_weights_by_their_form(tmp_path):
    """Of one layer with 1000 x 1000 weights and a batch of 500: 4 MB of float32, 2 MB in and 2 MB out."""
    import litert_torch
    import torch
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer

    file = tmp_path / "float32.tflite"
    layer = torch.nn.Linear(1000, 1000, bias=False).eval()
    litert_torch.convert(layer, (torch.zeros(500, 1000),)).export(str(file))
    casting = {"algorithm_key": algorithm_manager.AlgorithmName.FLOAT_CASTING}
    sizes = {"float32": budget.estimate(file)}
    for kind, method, bits, more in (
        ("float16", "add_weight_only_config", 16, casting),
        ("int8", "add_weight_only_config", 8, {}),
        ("int8-dynamic", "add_dynamic_config", 8, {}),
    ):
        worker = quantizer.Quantizer(str(file))
        getattr(worker, method)(".*", qtyping.TFLOperationName.FULLY_CONNECTED, bits, **more)
        path = tmp_path / f"{kind}.tflite"
        path.write_bytes(worker.quantize().quantized_model)
        sizes[kind] = budget.estimate(path)
    megabytes = {kind: (size / budget.MARGIN - budget.OVERHEAD) / MB for kind, size in sizes.items()}
    assert megabytes == pytest.approx({"float32": 8, "float16": 8.5, "int8": 13, "int8-dynamic": 5}, abs=0.1)


def test_the_estimate_of_the_embedded_bundle_lies_near_what_is_measured():
    bundle = Bundle.open(embedded_bundle(), verify=False)
    for name, spec in bundle.manifest.networks:
        measured = budget.measure(bundle.file(name), spec)
        assert budget.estimate(bundle.file(name)) == pytest.approx(measured, rel=0.3, abs=8 * MB), name
