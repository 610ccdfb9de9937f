"""The oracle's process, verdicts, parity and bisection: on drivers where there are any, on made-up answers always."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from op_cases import CASES, apply, i32
from op_models import ModelBuilder

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.delegate import stack as stack_module
from pocketfusion.mobile.delegate.bisect import bisect, compile_probe, number_probe
from pocketfusion.mobile.delegate.child import Answer, Child
from pocketfusion.mobile.delegate.graph import load
from pocketfusion.mobile.delegate.locate import locate
from pocketfusion.mobile.delegate.oracle import Oracle, parity, verdict
from pocketfusion.mobile.delegate.stack import GpuStack, choose, find_stacks
from pocketfusion.mobile.delegate.submodel import SIGNATURE, extract, float_weights, key

LOG = """INFO: something
ERROR: Following operations are not supported by GPU delegate:
BROADCAST_TO: Operation is not supported.
RESHAPE: Tensor dimensions must be less than 5. y
12 operations will run on the GPU, and the remaining 7 operations will run on the CPU.
"""


def chain(path, faulty: int = -1, length: int = 9):
    """`length` operations x -> x + c, one of them (`faulty`) a square of large numbers; tensors are called m.I#N."""
    b = ModelBuilder()
    last = b.tensor("x", (1, 4, 4, 8))
    for i in range(length):
        out = b.tensor(f"m.{i}#{i}", (1, 4, 4, 8))
        if i == faulty:
            b.operation("SQUARE", [last], [out])
        else:
            b.operation("ADD", [last, b.tensor(f"c{i}", values=np.full((1, 1, 1, 8), 0.5, np.float32))], [out])
        last = out
    b.build(["x"], [last], path)
    return load(path)


def test_verdict_reads_the_delegates_words():
    found = verdict(Answer("Some ops are not accelerated", None, LOG, 1.0))
    assert found.refused == {
        "BROADCAST_TO": "Operation is not supported.",
        "RESHAPE": "Tensor dimensions must be less than 5. y",
    }
    assert not found.accepted and not found.failure
    native = "E0000 00:00:1.2 7 delegate.cc:478] Failed to create a::B: INVALID_ARGUMENT: Shape mismatch: 1 vs 2\n"
    assert verdict(Answer("Failed", None, native, 1.0)).failure == "Shape mismatch: 1 vs 2"
    assert verdict(Answer("", None, LOG, 1.0)).accepted
    assert verdict(Answer("the process crashed (signal 11)", None, "", 0.0, ended=True)).failure.endswith("11)")


@pytest.mark.parametrize(("late", "passes"), [(2, True), (3, False)])
def test_a_gpu_that_is_late_is_asked_again(late, passes, monkeypatch):
    """As lavapipe on crowded cores; what it has compiled by then it keeps. Each time in a new process."""
    stopped = []
    words = "TensorBufferWrapper error: code=7, message=ERROR: └ Failed to lock custom tensor buffer."
    answers = [Answer(words, None, "", 9.0)] * late + [Answer("", {"y": np.ones(1)}, "", 1.0)]
    with Oracle(GpuStack("x", "y", (), ("fp32",))) as oracle:
        monkeypatch.setattr(oracle._child, "ask", lambda *given, **named: answers.pop(0))
        monkeypatch.setattr(oracle._child, "stop", lambda: stopped.append(len(answers)))
        found, outputs = oracle.run(Path("x.tflite"), {}, "fp32", "serving_default")
        monkeypatch.undo()
    assert found.accepted == (outputs is not None) == passes and len(stopped) == late
    assert passes or found.failure.startswith("the GPU was late 3 times") and len(answers) == 1


def test_parity_by_hand():
    expected, measured = np.array([3.0, -4.0], np.float32), np.array([3.0, -4.4], np.float32)
    found = parity("fp32", "s", [({"a": expected}, {"a": measured})])
    assert found.max_error == pytest.approx(0.1) and not found.right
    assert found.sqnr_db == pytest.approx(10 * np.log10(25 / 0.16), abs=1e-3)
    assert parity("fp16", "s", [({"a": expected}, {"a": expected})]).sqnr_db == 200
    nan = parity("fp16", "s", [({"a": expected}, {"a": np.array([np.nan, 0], np.float32)})])
    assert not nan.finite and not nan.right


def test_bisection_finds_the_shortest_range(tmp_path):
    graph = chain(tmp_path / "m.tflite", length=40).graphs[0]
    for first, last in ((0, 39), (7, 7), (12, 14), (39, 39), (0, 0)):
        found = bisect(graph, lambda i, j, a=first, b=last: "bad" if i <= a and b < j else "")
        assert [op.index for op in found.operations] == list(range(first, last + 1))
    assert bisect(graph, lambda i, j: "") is None


def test_a_part_computes_what_the_whole_does(tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    file = chain(tmp_path / "m.tflite", faulty=4)
    reads, writes = extract(file, file.graphs[0], [3, 4], tmp_path / "part.tflite")
    x = np.random.default_rng(0).standard_normal((1, 4, 4, 8)).astype(np.float32)
    runner = Interpreter(str(tmp_path / "part.tflite")).get_signature_runner(SIGNATURE)
    assert len(reads) == len(writes) == 1
    np.testing.assert_allclose(runner(**{key(reads[0]): x})[key(writes[0])], (x + 0.5) ** 2, rtol=1e-6)


def test_float_weights_equal_numpy(tmp_path):
    CASES["FULLY_CONNECTED dyn8pc"](tmp_path / "m.tflite")
    file = load(tmp_path / "m.tflite")
    assert float_weights(file, tmp_path / "f.tflite")
    source = file.model.subgraphs[0].tensors[1]
    scales = np.asarray(source.quantization.scale, np.float32)[:, None]
    weight = load(tmp_path / "f.tflite").graphs[0].operations[0].inputs[1]
    assert weight is not None and weight.values is not None and weight.dtype == "float32"
    rounded = file.graphs[0].operations[0].inputs[1].values()  # type: ignore[union-attr, misc]
    np.testing.assert_array_equal(weight.values(), rounded * scales)
    assert not float_weights(load(tmp_path / "f.tflite"), tmp_path / "again.tflite")


def test_child_survives_rubbish_and_hangs(tmp_path):
    chain(tmp_path / "m.tflite")
    (tmp_path / "bad.tflite").write_bytes(b"\0\0\0\0TFL3" + b"\7" * 100)
    x = {"x": np.zeros((1, 4, 4, 8), np.float32)}
    with Child({}, tmp_path) as child:
        assert child.ask(tmp_path / "bad.tflite", x, device="cpu").error
        slow = child.ask(tmp_path / "m.tflite", x, device="cpu", timeout=1e-4)
        assert slow.ended and "no answer" in slow.error
        outputs = child.ask(tmp_path / "m.tflite", x, device="cpu").outputs
        assert outputs is not None and np.allclose(next(iter(outputs.values())), 4.5)


def test_stacks_by_name_and_environment(monkeypatch, tmp_path):
    made = stack_module.GpuStack("one", "adapter", (), ("fp32",))
    assert choose((made,), "fp32") is made and choose((made,), "fp16") is None and choose((), "fp32") is None
    with pytest.raises(PocketfusionError, match="no GPU stack 'two' here"):
        choose((made,), "fp32", "two")
    monkeypatch.setenv(stack_module.ICD_VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(PocketfusionError, match="where there is no file"):
        list(stack_module._candidates())
    monkeypatch.delenv(stack_module.ICD_VARIABLE)
    monkeypatch.setenv(stack_module.LAVAPIPE_VARIABLE, str(tmp_path))
    with pytest.raises(PocketfusionError, match="libvulkan_lvp"):
        list(stack_module._candidates())


def test_a_driver_that_does_not_work_is_not_chosen(tmp_path):
    (tmp_path / "icd.json").write_text("{}")
    why = stack_module._probe("broken", {"VK_ICD_FILENAMES": str(tmp_path / "icd.json")})
    assert isinstance(why, str) and "compiled_model" not in why, why


VARIABLES = {"POCKETFUSION_VULKAN_ICD": "named", "POCKETFUSION_LAVAPIPE": "lavapipe", "VK_ICD_FILENAMES": "system"}


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_driver_that_is_named_has_to_work(variable, tmp_path, monkeypatch):
    """Falling back to another would say that all is well of a driver that was never asked."""
    place = tmp_path if variable == "POCKETFUSION_LAVAPIPE" else tmp_path / "icd.json"
    (tmp_path / "icd.json").write_text("{}")
    (tmp_path / "libvulkan_lvp.so").write_bytes(b"no library")
    for name in (*VARIABLES, "VK_DRIVER_FILES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(place))
    probe, other = stack_module._probe, GpuStack("other", "", (), ("fp32",))
    asked = VARIABLES[variable]
    monkeypatch.setattr(stack_module, "_probe", lambda name, env: probe(name, env) if name == asked else other)
    find_stacks.cache_clear()
    try:
        with pytest.raises(PocketfusionError, match=rf"{variable} names \({place}\) does not work here \(.+\): "):
            find_stacks()
    finally:
        find_stacks.cache_clear()


def test_the_missing_loader_is_named(monkeypatch):
    """Without libvulkan.so.1 no driver is found, whichever is installed."""
    monkeypatch.setattr(stack_module, "_LOADER", "libvulkan-that-is-not-there.so.1")
    said = stack_module.advice()
    assert said.startswith("libvulkan-that-is-not-there.so.1 is missing, so install Debian's package libvulkan1; then")
    with pytest.raises(PocketfusionError, match="is missing, so install Debian's package libvulkan1"):
        choose((), "fp32", "nvidia")
    monkeypatch.setattr(stack_module, "_LOADER", "libc.so.6")
    assert "is missing" not in stack_module.advice()


def test_swiftshader_has_no_fp16(fp32_stack):
    found = {stack.name: stack for stack in find_stacks()}
    if "swiftshader" in found:
        assert found["swiftshader"].precisions == ("fp32",)


def test_refused_operations_are_located(fp32_stack, tmp_path):
    b = ModelBuilder()
    x = b.tensor("x", (1, 8, 1, 4))
    shape = b.tensor("s", dtype="int32", values=[1, 8, 8, 4])
    wide, ok, tall = b.tensor("a.b#1", (1, 8, 8, 4)), b.tensor("c#2", (1, 64, 4)), b.tensor("d#3", (1, 8, 2, 4, 4))
    b.operation("BROADCAST_TO", [x, shape], [wide], version=2)
    b.operation("RESHAPE", [wide, b.tensor("s1", dtype="int32", values=[1, 64, 4])], [ok], newShape=[1, 64, 4])
    five = [1, 8, 2, 4, 4]
    b.operation("RESHAPE", [wide, b.tensor("s2", dtype="int32", values=five)], [tall], newShape=five)
    b.build([x], [ok, tall], tmp_path / "m.tflite")
    file = load(tmp_path / "m.tflite")
    with Oracle(fp32_stack, timeout=60) as oracle:
        said = oracle.compile(file.path)
        assert said.refused.keys() == {"BROADCAST_TO", "RESHAPE"}
        found = locate(oracle, file, file.graphs[0], said, "fp32")
    assert [(one.index, one.operation, one.module) for one in found] == [
        (0, "BROADCAST_TO", "a.b"),
        (2, "RESHAPE", "d"),
    ]
    assert "float32[1×8×8×4]" in found[0].tensors and "not supported" in found[0].reason


def test_a_crash_is_a_verdict_and_is_found(fp32_stack, tmp_path):
    """int8 through DEQUANTIZE into EMBEDDING_LOOKUP: the delegate of LiteRT 2.3 dies of a segmentation fault."""
    CASES["EMBEDDING_LOOKUP dq8"](tmp_path / "m.tflite")
    file = load(tmp_path / "m.tflite")
    with Oracle(fp32_stack, timeout=60) as oracle:
        assert "crashed" in oracle.compile(file.path).failure
        found = bisect(file.graphs[0], compile_probe(oracle, file, file.graphs[0], "fp32"))
        assert found is not None and [op.kind for op in found.operations] == ["EMBEDDING_LOOKUP"]
        CASES["EXP"](tmp_path / "m.tflite")
        assert oracle.compile(tmp_path / "m.tflite").accepted


def test_wrong_numbers_in_fp16_are_bisected(fp16_stack, tmp_path):
    file = chain(tmp_path / "m.tflite", faulty=5)
    graph, x = file.graphs[0], {"x": np.full((1, 4, 4, 8), 300, np.float32)}
    with Oracle(fp16_stack, timeout=60) as oracle:
        _, measured = oracle.run(file.path, x, "fp16", SIGNATURE)
        assert measured is not None and not np.isfinite(measured["m.8#8"]).any()
        found = bisect(graph, number_probe(oracle, file, graph, "fp16", x))
        assert found is not None and [op.module for op in found.operations] == ["m.5"]
        assert bisect(graph, number_probe(oracle, file, graph, "fp32", x)) is None


def test_numbers_on_the_gpu_equal_numpy(fp32_stack, tmp_path):
    """Not only the CPU's: a mean over positions, by hand."""
    apply("MEAN", [(2, 5, 6, 7)], (2, 1, 1, 7), [i32((1, 2))], keepDims=True)(tmp_path / "m.tflite")
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 7)).astype(np.float32)
    with Oracle(fp32_stack, timeout=60) as oracle:
        _, measured = oracle.run(tmp_path / "m.tflite", {"x0": x}, "fp32", SIGNATURE)
    assert measured is not None
    np.testing.assert_allclose(measured["y0"], x.mean((1, 2), keepdims=True), atol=1e-6)


def test_a_wrong_number_that_harms_nobody_is_not_at_fault(tmp_path):
    """y = x + mean(x), the mean next to nothing: off by many times itself it changes no result, off by 1 all."""
    b = ModelBuilder()
    x, y, z = b.tensor("x", (1, 4, 4, 8)), b.tensor("m.0#0", (1, 1, 1, 8)), b.tensor("m.1#1", (1, 4, 4, 8))
    b.operation("MEAN", [x, b.tensor("a", dtype="int32", values=[1, 2])], [y], keepDims=True)
    b.operation("ADD", [x, y], [z])
    b.build(["x"], [z], tmp_path / "m.tflite")
    file = load(tmp_path / "m.tflite")
    graph = file.graphs[0]
    values = np.random.default_rng(0).standard_normal((1, 4, 4, 8)).astype(np.float32)
    mean = key(graph.operations[0].outputs[0])

    class Off:
        """A GPU whose mean is off by `error`, and a CPU."""

        stack = GpuStack("made-up", "none", (), ("fp16",))
        folder = tmp_path
        error = 0.0

        def reference(self, path, inputs, signature):
            return oracle.reference(path, inputs, signature)

        def run(self, path, inputs, precision, signature):
            outputs = oracle.reference(path, inputs, signature).outputs
            return verdict(Answer({}, "", "", False)), {k: v + self.error * (k == mean) for k, v in outputs.items()}

    with Oracle(Off.stack, timeout=60) as oracle:
        off = Off()
        probe = number_probe(off, file, graph, "fp16", {"x": values - values.mean((1, 2), keepdims=True)})
        assert probe(0, 1) == probe(1, 2) == ""
        off.error = 1e-3
        assert probe(0, 1) == ""
        off.error = 1.0
        assert probe(0, 1).startswith("the results are off by ") and probe(1, 2) == ""
