"""A network in OpenVINO, on the CPU: it reads the ONNX files as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino

from pocketfusion.runtime.engines import Array
from pocketfusion.runtime.specs import Network


class OpenVINO:
    """`engines.Engine` by a compiled model. It refuses damaged files and weights outside the bundle itself."""

    def __init__(self, path: Path, spec: Network, num_threads: int, *, bfloat16: bool) -> None:
        """Reads and compiles; raises RuntimeError if the file is refused.

        `bfloat16` lets it compute so where the processor can, which is its own default; else in float32.
        """
        settings = {"INFERENCE_NUM_THREADS": num_threads, "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32"}
        self._model = openvino.Core().compile_model(str(path), "CPU", settings)
        self._request = self._model.create_infer_request()
        self._output = spec.outputs[0].name
        for tensor in spec.inputs:
            self._request.get_tensor(tensor.name)  # a name that the file lacks is told now

    def write(self, name: str, values: Array) -> None:
        self._request.get_tensor(name).data[:] = values

    def run(self) -> None:
        self._request.infer()

    def read(self) -> Array:
        return np.array(self._request.get_tensor(self._output).data)

    def feed_back(self, name: str) -> None:
        self.write(name, self.read())

    def close(self) -> None:
        del self._request, self._model
