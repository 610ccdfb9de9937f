"""One network of a bundle on LiteRT's CompiledModel: XNNPACK on the CPU, or the GPU delegate."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from ai_edge_litert.compiled_model import CompiledModel, CpuOptions, Environment, HardwareAccelerator, Options
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tensor_buffer import TensorBuffer

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.runtime import manifest
from pocketfusion.runtime.memory import release

Array = npt.NDArray[Any]
Accelerator = Literal["cpu", "gpu"]
ACCELERATORS: tuple[str, ...] = get_args(Accelerator)


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Network:
    """A `.tflite` file, loaded and ready: its constructor packs the weights, so that calls cost run time only.

    Inputs and output lie in buffers of the runtime. `write` fills inputs, which keep their values from run to run;
    `run` computes; `read` copies the output. Calling the network does all three. `swap` makes the output the next
    run's input, and `buffers` holds the inputs, so that a caller may exchange one for another, both without a copy.
    """

    def __init__(
        self,
        path: Path,
        spec: manifest.Network,
        num_threads: int,
        *,
        mapped: bool = False,
        accelerator: Accelerator = "cpu",
    ) -> None:
        """With `mapped` (CPU only), XNNPACK's packed weights go to a temporary file that is mapped into memory: pages
        that the system may drop, where the heap would hold them beside the pages of the network's own file.
        What this saves is measured in docs/memory.md; outputs and speed stay the same.

        Raises PocketfusionError if LiteRT refuses the file, the GPU does not take all of it (or there is none), or
        no signature has the manifest's tensors.
        """
        self.path, self.spec = path, spec
        # held until the network is closed: the mapping is of this file, which has no name in any folder
        self._packed = _temporary_file(spec) if mapped and accelerator == "cpu" else None
        with quiet():  # LiteRT's native log; its errors come as exceptions
            self._signature = self._find_signature()
            self._model = self._compile(num_threads, accelerator)
            self.buffers = {t.name: self.new_buffer(t.name) for t in spec.inputs}
            self._output_name = spec.outputs[0].name
            self._output = self._model.create_output_buffer_by_name(self._signature, self._output_name)

    def _find_signature(self) -> str:
        """The signature with the manifest's tensors. The interpreter reads it, because it verifies the file's
        structure, where CompiledModel crashes on a truncated one."""
        try:
            reader = Interpreter(
                str(self.path), experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
            )
        except (ValueError, RuntimeError) as error:
            raise self._refused(error) from None
        for name in reader.get_signature_list():
            runner = reader.get_signature_runner(name)
            given = {k: (tuple(d["shape"]), np.dtype(d["dtype"]).name) for k, d in runner.get_input_details().items()}
            wanted = {t.name: (tuple(t.shape), t.dtype) for t in self.spec.inputs}
            if given == wanted and {t.name for t in self.spec.outputs} == set(runner.get_output_details()):
                return name
        tensors = ", ".join(f"{t.name} {t.shape} {t.dtype}" for t in self.spec.inputs)
        raise PocketfusionError(
            f"{self.path} has no signature with the inputs and outputs that its manifest names ({tensors}): "
            "export the bundle again"
        )

    def _compile(self, num_threads: int, accelerator: Accelerator) -> CompiledModel:
        cpu = CpuOptions(num_threads=num_threads)
        if self._packed:
            cpu.xnnpack_weight_cache_path = f"/proc/self/fd/{self._packed.fileno()}"
        kind = HardwareAccelerator.CPU if accelerator == "cpu" else HardwareAccelerator.GPU
        try:
            return CompiledModel.from_file(
                str(self.path), environment=_environment(), options=Options(kind, cpu_options=cpu)
            )
        except RuntimeError as error:
            if accelerator == "cpu":
                raise self._refused(error) from None
            if "not accelerated" in str(error):
                raise PocketfusionError(
                    f"the GPU does not take every operation of {self.path}: export the bundle with --target "
                    "litert-gpu, or run it on the CPU"
                ) from None
            raise PocketfusionError(
                f"{self.path} cannot be run on a GPU, as LiteRT finds none that it can use here: install a Vulkan "
                "driver, or run it on the CPU"
            ) from None

    def _refused(self, error: Exception) -> PocketfusionError:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        return PocketfusionError(f"LiteRT cannot load {self.path} ({reason}): export the bundle again")

    def new_buffer(self, name: str) -> Any:
        """A buffer of the input `name`, to be filled with its `write` and put into `buffers`."""
        return self._model.create_input_buffer_by_name(self._signature, name)

    def write(self, **inputs: Array) -> None:
        """Copies `inputs`, given by the manifest's names and of its shapes and types, into their buffers."""
        for name, values in inputs.items():
            self.buffers[name].write(values)

    def run(self) -> None:
        """Computes the output from what the buffers hold."""
        self._model.run_by_name(self._signature, self.buffers, {self._output_name: self._output})

    def read(self) -> Array:
        """A copy of the network's first output."""
        spec = self.spec.outputs[0]
        values = self._output.read(int(np.prod(spec.shape)), np.dtype(spec.dtype))
        return values.reshape(spec.shape)

    def swap(self, name: str) -> None:
        """Exchanges the output's buffer with that of the input `name`, of the same shape: the next run reads what the
        last one wrote (Squeezing's diffusion mode, arXiv 2307.01193)."""
        self.buffers[name], self._output = self._output, self.buffers[name]

    def __call__(self, **inputs: Array) -> Array:
        """The network's first output for `inputs`, given by the manifest's names."""
        self.write(**inputs)
        self.run()
        return self.read()

    def close(self) -> None:
        """Frees everything and gives the memory back to the system; the network cannot be used any more."""
        self.buffers.clear()
        self._output = None
        self._model.close()
        if self._packed:
            self._packed.close()
        release()


@cache
def _environment() -> Environment:
    """LiteRT's environment, one for the process: each would load its accelerators anew."""
    environment = Environment.create()
    TensorBuffer.create_from_host_memory(np.zeros(16, np.float32))  # the first buffer makes a second one, with a log
    # never destroyed: its destructor writes to the terminal when the process ends
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(environment))
    return environment


def _temporary_file(spec: manifest.Network) -> IO[bytes] | None:
    """A file without a name, which vanishes with the process however that ends; None where that has no path either.

    Raises PocketfusionError if the disk lacks the space for the packed weights: LiteRT would write until it is full.
    """
    if not Path("/proc/self/fd").is_dir():
        return None
    folder = tempfile.gettempdir()
    packed = spec.parameters * (1 if spec.weights in ("int8-dynamic", "int4-dynamic") else 4)
    if (free := shutil.disk_usage(folder).free) < packed:
        raise PocketfusionError(
            f"the packed weights need up to {packed / 1e6:,.0f} MB in {folder}, which has {free / 1e6:,.0f} MB free: "
            "set TMPDIR to a folder with more, or choose the mode resident"
        )
    return tempfile.TemporaryFile(prefix="pocketfusion-")
