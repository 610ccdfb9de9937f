"""The runtimes that draw here, by name: whose bundles each takes, how it loads and calls a network, its version.

LiteRT is part of every installation, the others are extras. Each is imported when a network is first loaded with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pocketfusion.errors import INSTALL_ONNX, INSTALL_OPENVINO, PocketfusionError
from pocketfusion.runtime.engines import Array, Engine
from pocketfusion.runtime.manifest import Manifest
from pocketfusion.runtime.specs import Network, TensorSpec


class OpenVINO:
    """`engines.Engine` by a compiled model. It refuses damaged files and weights outside the bundle itself."""

    def __init__(self, path: Path, spec: Network, num_threads: int, *, bfloat16: bool) -> None:
        """Reads and compiles; raises RuntimeError if the file is refused.

        `bfloat16` lets it compute so where the processor can, which is its own default; else in float32.
        """
        import openvino

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
    import onnxruntime

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


#: `openvino-bf16`: the same, which may round what it multiplies to bfloat16 where the processor has products of it.
RuntimeName = Literal["litert", "onnxruntime", "openvino", "openvino-bf16"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
_PACKAGES = {"litert": "ai-edge-litert", "onnxruntime": "onnxruntime"}


def choose_runtime(path: Path, manifest: Manifest, asked: str | None = None) -> RuntimeName:
    """The runtime `asked` for, else that of the bundle's files; raises PocketfusionError for one that is unknown,
    takes no such files or is not installed."""
    takes: tuple[RuntimeName, ...] = RUNTIMES[1:] if manifest.target == "onnx" else RUNTIMES[:1]
    chosen = next((name for name in RUNTIMES if name == (asked or takes[0])), None)
    if chosen is None:
        raise PocketfusionError(f"the runtime is {asked!r}: choose {', '.join(RUNTIMES[:-1])} or {RUNTIMES[-1]}")
    if chosen not in takes:
        export = "--target litert-cpu" if chosen == "litert" else "--target onnx"
        raise PocketfusionError(
            f"the runtime is {chosen} and {path} is a bundle for {manifest.target}, which takes {' or '.join(takes)}: "
            f"leave the runtime out, or export the model with {export}"
        )
    package = chosen.partition("-")[0]
    if chosen != "litert" and find_spec(package) is None:
        install = INSTALL_ONNX if chosen == "onnxruntime" else INSTALL_OPENVINO
        raise PocketfusionError(f"{path} needs {package}, which is not installed: {install}")
    return chosen


def load_engine(runtime: RuntimeName, path: Path, spec: Network, num_threads: int) -> Engine:
    """A network in a runtime other than LiteRT; raises ValueError or RuntimeError if that refuses the file."""
    if runtime == "onnxruntime":
        return OnnxRuntime(path, spec, num_threads)

    return OpenVINO(path, spec, num_threads, bfloat16=runtime == "openvino-bf16")


def runtime_version(runtime: RuntimeName) -> str:
    """Its package and version, as measurements name it."""
    package = _PACKAGES.get(runtime, "openvino")
    return f"{package} {version(package)}" + (" in bfloat16" if runtime == "openvino-bf16" else "")
