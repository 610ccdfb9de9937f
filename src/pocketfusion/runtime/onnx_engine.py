"""A network in ONNX Runtime, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pocketfusion.runtime.engines import Array
from pocketfusion.runtime.specs import Network, TensorSpec

_TYPES = {"tensor(float)": "float32", "tensor(int32)": "int32"}
#: Weights in 8 bits are unpacked once, when the file is loaded: else each call would do it again.
_UNPACK_AT_LOAD = "session.disable_quant_qdq"
_FATAL = 4  #: of ONNX Runtime's log, which writes to the terminal; its errors come as exceptions


class OnnxRuntime:
    """`engines.Engine` by an `InferenceSession`. It refuses damaged files and weights outside the bundle itself."""

    def __init__(self, path: Path, spec: Network, num_threads: int) -> None:
        """Loads and optimises; raises ValueError for other tensors than the manifest's, RuntimeError if the file is
        refused."""
        self._session = session(path, num_threads)
        _check(self._session.get_inputs(), spec.inputs)
        _check(self._session.get_outputs(), spec.outputs)
        self._output = spec.outputs[0].name
        self._inputs: dict[str, Array] = {}

    def write(self, name: str, values: Array) -> None:
        self._inputs[name] = np.array(values)

    def run(self) -> None:
        try:
            (self._result,) = self._session.run([self._output], self._inputs)
        except Exception as error:  # its own classes, which have no other base
            raise RuntimeError(str(error)) from None

    def read(self) -> Array:
        return np.array(self._result)

    def feed_back(self, name: str) -> None:
        self._inputs[name] = self._result

    def close(self) -> None:
        del self._session
        self._inputs.clear()


def session(path: Path, num_threads: int) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU; raises RuntimeError if the file is refused."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = _FATAL
    options.add_session_config_entry(_UNPACK_AT_LOAD, "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads that wait leave their cores
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RuntimeError(str(error)) from None


def _check(tensors: Any, wanted: list[TensorSpec]) -> None:
    found: Mapping[str, Any] = {one.name: (_TYPES.get(one.type), list(one.shape)) for one in tensors}
    if found != {one.name: (one.dtype, one.shape) for one in wanted}:
        raise ValueError(f"its tensors are not those of the manifest, {', '.join(one.name for one in wanted)}")
