"""The ONNX networks in ONNX Runtime Web, in Chromium: what onnxruntime computes in Python, to 80 dB."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pocketfusion.mobile.gate import sqnr
from pocketfusion.mobile.onnx.weight_storage import store
from pocketfusion.runtime.manifest import NETWORKS


def test_a_browser_computes_what_python_does(
    vitest: Callable, onnx_parts: Path, onnxruntime_web: Path, chromium: str, tmp_path: Path
) -> None:
    """Every network in every form of weights, the same inputs: float32 to 80 dB, and so the others."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    random = np.random.default_rng(5)
    cases = []
    for form in ("float32", "float16", "int8"):
        for network in NETWORKS:
            file = f"{network}-{form}.onnx"
            store(onnx_parts / network, tmp_path / file, form)
            session = onnxruntime.InferenceSession(str(tmp_path / file), options, ["CPUExecutionProvider"])
            given = {one.name: _drawn(random, one.type, one.shape) for one in session.get_inputs()}
            (output,) = session.run(None, given)
            output.tofile(tmp_path / f"{file}.expected")
            inputs = []
            for name, values in given.items():
                values.tofile(tmp_path / f"{file}.{name}")
                inputs.append({"name": name, "type": str(values.dtype), "dims": values.shape})
            cases.append({"file": file, "inputs": inputs, "dims": output.shape})
    (tmp_path / "onnx.json").write_text(json.dumps(cases))
    (tmp_path / "page.html").write_text("<!doctype html>")
    vitest("tests/engine/onnx.test.ts", POCKETFUSION_VECTORS=str(tmp_path), POCKETFUSION_CHROMIUM=chromium)
    for case in cases:
        expected, found = (
            np.fromfile(tmp_path / f"{case['file']}.{end}", np.float32) for end in ("expected", "found")
        )
        assert np.ptp(expected) > 0
        assert sqnr(expected, found) > 80, case["file"]


def _drawn(random: np.random.Generator, kind: str, shape: list[int]) -> np.ndarray:
    """Noise; ones for a text's ids and mask are valid in both."""
    if kind == "tensor(int32)":
        return random.integers(1, 2, shape, dtype=np.int32)
    return random.standard_normal(shape, dtype=np.float32)
