"""One network of a bundle, run by the LiteRT interpreter (XNNPACK on the CPU)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert.interpreter import Interpreter

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.runtime import manifest

Array = npt.NDArray[Any]


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Network:
    """A `.tflite` file, loaded and ready: its constructor allocates and packs, so that calls cost run time only."""

    def __init__(self, path: Path, spec: manifest.Network, num_threads: int) -> None:
        """Raises PocketfusionError if LiteRT refuses the file or no signature has the manifest's tensors."""
        self.path, self.spec = path, spec
        try:
            with quiet():  # LiteRT's native "Created XNNPACK delegate"; its errors come as exceptions
                # held because LiteRT's signature runners use it without owning it
                self._interpreter = Interpreter(str(path), num_threads=num_threads)
                self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise PocketfusionError(f"LiteRT cannot load {path} ({reason}): export the bundle again") from None
        self._runners = {}
        for name in self._interpreter.get_signature_list():
            runner = self._interpreter.get_signature_runner(name)
            shapes = {key: tuple(d["shape"]) for key, d in runner.get_input_details().items()}
            if self._fits(runner, shapes):
                self._runners[shapes[spec.inputs[0].name][0]] = runner
        if spec.inputs[0].shape[0] not in self._runners:
            wanted = ", ".join(f"{t.name} {t.shape} {t.dtype}" for t in spec.inputs)
            raise PocketfusionError(
                f"{path} has no signature with the inputs and outputs that its manifest names ({wanted}): "
                "export the bundle again"
            )

    def _fits(self, runner: Any, shapes: dict[str, tuple[int, ...]]) -> bool:
        """True if the signature has the manifest's tensors, its batch size (the first extent) apart."""
        types = {key: np.dtype(d["dtype"]).name for key, d in runner.get_input_details().items()}
        return (
            types == {t.name: t.dtype for t in self.spec.inputs}
            and all(shapes[t.name][1:] == tuple(t.shape[1:]) for t in self.spec.inputs)
            and {t.name for t in self.spec.outputs} == set(runner.get_output_details())
        )

    @property
    def batch_sizes(self) -> set[int]:
        """Batch sizes that the file has a signature for; the manifest's is among them."""
        return set(self._runners)

    def __call__(self, **inputs: Array) -> Array:
        """The network's first output for `inputs`, given by the manifest's names and of a batch size that it has."""
        runner = self._runners[inputs[self.spec.inputs[0].name].shape[0]]
        return runner(**inputs)[self.spec.outputs[0].name]
