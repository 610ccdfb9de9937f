"""The two ways in which LiteRT runs a network, behind one small interface.

`Interpreted` is LiteRT's interpreter on the CPU: it lets other Python threads run meanwhile, and keeps packed weights
in the heap. `Compiled` is its CompiledModel: packed weights in a mapped file, or the GPU; its Python binding holds the
interpreter lock while it loads and runs. Outputs on the CPU are the same bytes, and times too (docs/memory.md).
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from ai_edge_litert.compiled_model import (
    CompiledModel,
    CpuOptions,
    Environment,
    GpuOptions,
    HardwareAccelerator,
    Options,
)
from ai_edge_litert.interpreter import Interpreter

from pocketfusion.runtime.specs import Network

Array = npt.NDArray[Any]


class Engine(Protocol):
    """A network whose inputs keep their values from run to run."""

    def write(self, name: str, values: Array) -> None:
        """Copies `values` into the input `name`."""

    def run(self) -> None:
        """Computes the output."""

    def read(self) -> Array:
        """A copy of the output."""

    def feed_back(self, name: str) -> None:
        """Makes the output of the last run the input `name`, of the same shape, of the next."""

    def close(self) -> None:
        """Frees everything; nothing else may be called after it."""


class Interpreted:
    """LiteRT's interpreter with XNNPACK."""

    def __init__(self, path: Path, spec: Network, signature: str, num_threads: int) -> None:
        """Loads and packs; raises ValueError or RuntimeError if LiteRT refuses the file."""
        self._interpreter = Interpreter(str(path), num_threads=num_threads)
        self._interpreter.allocate_tensors()
        runner = self._interpreter.get_signature_runner(signature)
        self._inputs = {name: details["index"] for name, details in runner.get_input_details().items()}
        self._output = runner.get_output_details()[spec.outputs[0].name]["index"]

    def write(self, name: str, values: Array) -> None:
        self._interpreter.set_tensor(self._inputs[name], values)

    def run(self) -> None:
        self._interpreter.invoke()

    def read(self) -> Array:
        return self._interpreter.get_tensor(self._output)

    def feed_back(self, name: str) -> None:
        self.write(name, self.read())  # a few microseconds: the interpreter's tensors cannot be exchanged

    def close(self) -> None:
        del self._interpreter


class Compiled:
    """LiteRT's CompiledModel: on the CPU with packed weights in a mapped file, or on the GPU."""

    def __init__(self, path: Path, spec: Network, signature: str, options: Options) -> None:
        """Loads and packs; raises RuntimeError if LiteRT refuses the file or the GPU does not take all of it."""
        self._model = CompiledModel.from_file(str(path), environment=_environment(), options=options)
        self._signature, self._spec = signature, spec.outputs[0]
        self._inputs = {t.name: self._model.create_input_buffer_by_name(signature, t.name) for t in spec.inputs}
        self._output = self._model.create_output_buffer_by_name(signature, self._spec.name)
        # the first use of a buffer makes one more environment, with a log: here it is made where the log goes nowhere
        self.read()

    def write(self, name: str, values: Array) -> None:
        self._inputs[name].write(values)

    def run(self) -> None:
        self._model.run_by_name(self._signature, self._inputs, {self._spec.name: self._output})

    def read(self) -> Array:
        values = self._output.read(int(np.prod(self._spec.shape)), np.dtype(self._spec.dtype))
        return values.reshape(self._spec.shape)

    def feed_back(self, name: str) -> None:
        # *Squeezing*'s diffusion mode (arXiv 2307.01193): the buffers change places, nothing is copied
        self._inputs[name], self._output = self._output, self._inputs[name]

    def close(self) -> None:
        self._inputs.clear()
        del self._output
        self._model.close()


def cpu_options(num_threads: int, packed: Path) -> Options:
    """Options of `Compiled` for the CPU, with packed weights in the file at `packed`."""
    cpu = CpuOptions(num_threads=num_threads, xnnpack_weight_cache_path=str(packed))
    return Options(HardwareAccelerator.CPU, cpu_options=cpu)


def gpu_options(spec: Network) -> Options:
    """Options of `Compiled` for the GPU alone, in the precision that the network asks for."""
    return Options(HardwareAccelerator.GPU, gpu_options=GpuOptions(enforce_f32=spec.gpu_precision == "fp32"))


@cache
def _environment() -> Environment:
    """LiteRT's environment, one for the process: each would load its accelerators anew."""
    environment = Environment.create()
    # never destroyed: its destructor writes to the terminal when the process ends
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment))
    return environment
