"""`check` as a user runs it: tables, JSON, exit codes; ranges; bad input."""

from __future__ import annotations

import json
import os
from functools import partial

import numpy as np
import pytest
from op_cases import CASES, apply
from op_models import ModelBuilder

from pocketfusion.mobile.delegate import calibration, locate
from pocketfusion.mobile.delegate import check as check_module
from pocketfusion.mobile.delegate.calibration import calibrate
from pocketfusion.mobile.delegate.check import check
from pocketfusion.mobile.delegate.graph import load
from pocketfusion.mobile.delegate.stack import GpuStack
from pocketfusion.runtime.denoise import seeded_noise
from pocketfusion.runtime.manifest import NETWORKS, embedded_bundle, read_manifest

UNET = read_manifest(embedded_bundle())[0].networks.unet


@pytest.fixture
def run(run):
    """`pocketfusion check` in this process."""
    return partial(run, "check")


@pytest.fixture
def group_norm(tmp_path):
    """A stock nn.GroupNorm as litert-torch exports it."""
    litert_torch = pytest.importorskip("litert_torch")
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(4, 16)

        def forward(self, x):
            return self.norm(x)

    litert_torch.convert(Net().eval(), (torch.randn(1, 16, 4, 4),)).export(str(tmp_path / "norm.tflite"))
    return tmp_path / "norm.tflite"


def normalise(path, gain: float):
    """mean(x²) of gain·x, as a normalisation computes it, then 1/sqrt."""
    b = ModelBuilder()
    x, g = b.tensor("x", (1, 8, 8, 4)), b.tensor("g", values=np.full((1, 1, 1, 4), gain, np.float32))
    scaled, squared = b.tensor("pre#0", (1, 8, 8, 4)), b.tensor("blocks.1.norm#1", (1, 8, 8, 4))
    mean, root = b.tensor("blocks.1.norm#2", (1, 8, 8, 1)), b.tensor("blocks.1.norm#3", (1, 8, 8, 1))
    b.operation("MUL", [x, g], [scaled])
    b.operation("SQUARE", [scaled], [squared])
    b.operation("MEAN", [squared, b.tensor("a", dtype="int32", values=[3])], [mean], keepDims=True)
    b.operation("RSQRT", [mean], [root])
    b.build(["x"], [root], path)
    return path


def test_stock_group_norm_names_the_cure(run, group_norm, tmp_path):
    code, printed, _ = run(group_norm, "--static", "--json", tmp_path / "r.json")
    assert code == 1 and "static verdict, by the rules alone (as asked)" in printed
    assert "2 × BROADCAST_TO: Operation is not supported." in printed and "rewrite `group-norm`" in printed
    report = json.loads((tmp_path / "r.json").read_text())
    (graph,) = report["graphs"]
    assert not report["passed"] and graph["verdict"] == "static" and graph["refused"][0]["module"] == "norm"
    assert graph["refused"][0]["tensors"] == "float32[1×4×1×1], int32[4] constant -> float32[1×4×4×1]"


def test_stock_group_norm_on_the_delegate(run, group_norm, fp32_stack, tmp_path):
    code, printed, _ = run(group_norm, "--json", tmp_path / "r.json")
    assert code == 1 and "GPU stack " in printed and "2 × BROADCAST_TO" in printed
    (graph,) = json.loads((tmp_path / "r.json").read_text())["graphs"]
    assert graph["verdict"] == "refused" and [one["index"] for one in graph["refused"]] == [8, 11]


def test_accepted_graph_exits_with_0(run, tmp_path, fp32_stack):
    CASES["CONV_2D float16"](tmp_path / "m.tflite")
    code, printed, _ = run(tmp_path / "m.tflite", "--precision", "fp32", "--json", tmp_path / "r.json")
    assert code == 0 and "all of it runs on the GPU delegate" in printed and "seeded" in printed
    (graph,) = json.loads((tmp_path / "r.json").read_text())["graphs"]
    assert graph["verdict"] == "gpu" and graph["parities"][0]["sqnr_db"] > 100
    assert graph["parities"][0]["precision"] == "fp32"


def test_integer_weights_are_compared_in_float(tmp_path, fp32_stack):
    """The CPU rounds activations to 8 bits, about 45 dB; the GPU does not."""
    CASES["FULLY_CONNECTED dyn8pc"](tmp_path / "m.tflite")
    (graph,) = check(tmp_path / "m.tflite", precisions=("fp32",)).graphs
    assert graph.passed and graph.parities[0].sqnr_db > 100 and "dequantised weights" in graph.notes[0]


def test_known_fault_is_named(tmp_path, fp32_stack):
    CASES["BATCH_MATMUL broadcast"](tmp_path / "m.tflite")
    (graph,) = check(tmp_path / "m.tflite", precisions=("fp32",)).graphs
    assert not graph.passed and not graph.culprit
    assert "computed wrongly" in graph.refused[0].reason and "attention" in graph.refused[0].cure


def test_overflow_in_fp16_is_at_fault(tmp_path, fp16_stack):
    (graph,) = check(normalise(tmp_path / "m.tflite", 2000.0), precisions=("fp16",)).graphs
    assert not graph.passed and "SQUARE" in graph.culprit and "blocks.1.norm" in graph.culprit
    (graph,) = check(normalise(tmp_path / "m.tflite", 2.0), precisions=("fp16",)).graphs
    assert graph.passed and not graph.culprit


def test_ranges_by_hand(tmp_path):
    path = normalise(tmp_path / "m.tflite", 100.0)
    x = np.ones((1, 8, 8, 4), np.float32)
    x[0, 0, 0, 0] = 4.0
    found = calibrate(path, load(path).graphs[0], "serving_default", [{"x": x}])
    assert found.largest == 160_000 and found.largest_module == "blocks.1.norm" and found.runs == 1
    certain = {(risk.operation, risk.value) for risk in found.risks if risk.certain}
    assert certain == {("SQUARE", 160_000.0)}  # (160,000 + 3·10,000) / 4 = 47,500 is near, not beyond
    assert ("MEAN", 47_500.0) in {(risk.operation, risk.value) for risk in found.risks}
    assert all("norm" in risk.cure for risk in found.risks)
    small = calibrate(path, load(path).graphs[0], "serving_default", [{"x": x * 1e-5}])
    assert [(risk.operation, risk.kind) for risk in small.risks] == [("RSQRT", "underflow")]
    assert small.risks[0].value == pytest.approx(1e-6, rel=1e-3)


def test_the_worst_of_several_runs_counts(tmp_path):
    path = normalise(tmp_path / "m.tflite", 1.0)
    runs = [{"x": np.full((1, 8, 8, 4), value, np.float32)} for value in (1.0, 300.0, 2.0)]
    assert calibrate(path, load(path).graphs[0], "serving_default", runs).largest == 90_000


def test_bundle_is_checked_with_its_own_inputs():
    """The embedded bundle: each network's calls while a picture is drawn, the UNet's from its noise on."""
    inputs = calibration.recorded(embedded_bundle(), 1)
    assert [(name, len(inputs[name])) for name in NETWORKS] == [("text_encoder", 2), ("unet", 3), ("decoder", 1)]
    assert all(tensor.name in one for one in inputs["unet"] for tensor in UNET.inputs)
    first = inputs["unet"][0]["sample"]
    np.testing.assert_array_equal(first[0], seeded_noise(calibration.SEED, *first.shape[1:]))
    assert not np.array_equal(first, inputs["unet"][1]["sample"])
    assert not np.array_equal(inputs["text_encoder"][0]["input_ids"], inputs["text_encoder"][1]["input_ids"])


def test_bundle_has_a_verdict_per_network():
    report = check(embedded_bundle(), static=True)
    assert [graph.network for graph in report.graphs] == list(NETWORKS)
    assert all(graph.operations > 300 for graph in report.graphs)


def test_without_a_stack_the_verdict_is_static(run, tmp_path, monkeypatch):
    monkeypatch.setattr(check_module, "find_stacks", lambda: ())
    CASES["GATHER_ND"](tmp_path / "m.tflite")
    code, printed, _ = run(tmp_path / "m.tflite")
    assert (
        code == 1
        and "static verdict" in printed
        and "no GPU stack works here: " in printed
        and "by the rules, " in printed
    )
    CASES["CONV_2D dyn8pc"](tmp_path / "m.tflite")
    code, printed, _ = run(tmp_path / "m.tflite")
    assert code == 0 and "largest activation" in printed


def test_all_signatures_are_checked(tmp_path):
    """Two signatures of one file: the second's BROADCAST_TO is reported under its name."""
    CASES["BROADCAST_TO"](tmp_path / "a.tflite")
    CASES["EXP"](tmp_path / "b.tflite")
    first, second = load(tmp_path / "a.tflite").model, load(tmp_path / "b.tflite").model
    shift, codes = len(second.buffers), len(second.operatorCodes)
    for tensor in first.subgraphs[0].tensors:
        tensor.buffer += shift
    first.subgraphs[0].operators[0].opcodeIndex += codes
    second.buffers += first.buffers
    second.operatorCodes += first.operatorCodes
    second.subgraphs += first.subgraphs
    first.signatureDefs[0].signatureKey, first.signatureDefs[0].subgraphIndex = b"wide", 1
    second.signatureDefs += first.signatureDefs
    from pocketfusion.mobile import flatbuffer

    flatbuffer.write(second, tmp_path / "m.tflite")
    report = check(tmp_path / "m.tflite", precisions=("fp32",))
    assert [(graph.signature, graph.passed) for graph in report.graphs] == [("serving_default", True), ("wide", False)]


def test_bad_input(run, tmp_path):
    b = ModelBuilder()
    x, y = b.tensor("x", (1, 4)), b.tensor("y", (1, 4))
    b.operation("CUSTOM", [x], [y], custom="FlexErf")
    b.build([x], [y], tmp_path / "custom.tflite")
    (tmp_path / "text.tflite").write_text("not a model at all")
    CASES["EXP"](tmp_path / "good.tflite")
    content = (tmp_path / "good.tflite").read_bytes()
    (tmp_path / "cut.tflite").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.tflite").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo.tflite")
    for arguments, words in (
        ([tmp_path / "custom.tflite"], "custom operation FlexErf"),
        ([tmp_path / "text.tflite"], "is not a .tflite file"),
        ([tmp_path / "cut.tflite"], "is damaged"),
        ([tmp_path / "empty.tflite"], "is not a .tflite file"),
        ([tmp_path / "none.tflite"], "No such file"),
        ([tmp_path / "fifo.tflite"], "is a FIFO, socket or device"),
        ([tmp_path], "is not a bundle"),
        ([tmp_path / "good.tflite", "--precision", "int8"], "choose fp32 or fp16"),
        ([tmp_path / "good.tflite", "--threads", "0"], "the number of threads is 0: choose 1 to"),
        ([tmp_path / "good.tflite", "--static", "--json", tmp_path / "no" / "r.json"], "does not exist"),
    ):
        code, printed, notes = run(*arguments)
        assert (code, printed) == (2, "") and words in notes and notes.count("\n") == 1, (arguments, notes)


def test_cures_are_rewrites():
    """Every rewrite that a cure names is one that the exporter has, or the wrappers' time embedding."""
    import inspect
    import re

    pytest.importorskip("torch")
    from pocketfusion.mobile.rewrites import PASSES

    named = set(re.findall(r"rewrite `([\w-]+)`|or `([\w-]+-norm)`", inspect.getsource(locate)))
    assert {name for pair in named for name in pair if name} <= PASSES.keys() | {"time-embedding"}


def test_a_bundle_for_the_cpu_says_so_before_its_verdict(run, tmp_path):
    code, printed, _ = run(embedded_bundle(), "--static", "--json", tmp_path / "r.json")
    assert code == 1 and printed.startswith("this bundle was made for the CPU: ")
    assert "export it with --target litert-gpu" in printed.splitlines()[0]
    assert json.loads((tmp_path / "r.json").read_text())["target"] == "litert-cpu"


def test_a_precision_that_no_driver_has_is_not_passed_over(run, tmp_path, monkeypatch):
    apply("EXP", [(1, 4)], (1, 4))(tmp_path / "m.tflite")
    monkeypatch.setattr(check_module, "find_stacks", lambda: (GpuStack("software", "", (), ("fp32",)),))
    for arguments in (("--precision", "fp16"), ("--stack", "software", "--precision", "fp16")):
        code, printed, notes = run(tmp_path / "m.tflite", *arguments)
        assert (code, printed) == (2, "") and "no GPU stack here computes in fp16 (software in fp32): " in notes


def test_unknown_stack(run, tmp_path):
    apply("EXP", [(1, 4)], (1, 4))(tmp_path / "m.tflite")
    code, _, notes = run(tmp_path / "m.tflite", "--stack", "nvidia")
    assert code == 2 and "no GPU stack 'nvidia' here" in notes
