"""A runtime's part of an export: what its files are, how they are made and run, and what the manifest says of them.

One class a runtime, the only place that knows of it: `export` has the order of things, `devices` what a target wants,
`gate` how near is near enough. A runtime more is a class more here, a row in `devices`, and a target in the manifest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from pocketfusion.mobile import gate
from pocketfusion.mobile.convert import DEFAULT_SIGNATURE, convert
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.measure import Run
from pocketfusion.mobile.pipeline_specs import Samples
from pocketfusion.mobile.quantization.packing import Form, pack
from pocketfusion.mobile.quantization.weight_forms import NetworkRecipe, coarsest, quantize
from pocketfusion.runtime.manifest import Manifest
from pocketfusion.runtime.trust.litert_file import verify


class Stored(Protocol):
    """A network in the bundle, its weights in their forms."""

    label: str  #: of its weights
    form: str  #: the coarsest of them
    size: int  #: of its files, in bytes
    runs: dict[str, Run]  #: by the arithmetic: what the gate runs, the first in full, `fp16` rounded

    def close(self) -> None:
        """Drops what only the gate needed."""


class Backend(Protocol):
    """A runtime, for one export."""

    suffix: str  #: of a converted network beside the bundle

    def check(self, guidance: str) -> None:
        """Raises PocketfusionError for a model that the runtime's files cannot be of."""

    def convert(self, module: nn.Module, samples: Samples, file: Path) -> None:
        """Writes the network with exact weights, or as exact as the runtime has them."""

    def store(self, exact: Path, bundle: Path, network: str, module: nn.Module, kind: str | NetworkRecipe) -> Stored:
        """Writes the network into the folder of the `bundle`, its weights as `kind` says."""

    def files(self, bundle: Path, tokenizer: Any, folder: Path) -> dict[str, Path]:
        """The runtime's files for the manifest, by name: the networks' and what else it wants beside them, of the
        model `folder`."""

    def manifest(self, bundle: Path) -> dict[str, Any]:
        """The manifest's fields that are this runtime's own."""

    def verify(self, bundle: Path, manifest: Manifest) -> None:
        """Raises PocketfusionError for files that the runtime would refuse."""


def backend_of(settings: ExportSettings) -> Backend:
    """The runtime of the settings' target."""
    if settings.device.runtime == "coreml":
        from pocketfusion.mobile.coreml.core_ml import CoreML

        return CoreML(settings)
    if settings.device.runtime == "onnx":
        from pocketfusion.mobile.onnx.onnx_backend import ONNX

        return ONNX(settings)
    return LiteRT(settings)


class LiteRT:
    """`NETWORK.tflite`, by litert-torch; weights packed by this project."""

    suffix = ".tflite"

    def __init__(self, settings: ExportSettings) -> None:
        self._settings = settings

    def check(self, guidance: str) -> None:
        """Whatever can be loaded."""

    def convert(self, module: nn.Module, samples: Samples, file: Path) -> None:
        convert(module, samples, file, self._settings.device)

    def store(self, exact: Path, bundle: Path, network: str, module: nn.Module, kind: str | NetworkRecipe) -> Stored:
        file = bundle / f"{network}.tflite"
        chosen = quantize(exact, file, kind, self._settings.target)
        return _Packed(file, self._as_the_device_computes(exact, file, chosen), kind, chosen)

    def _as_the_device_computes(self, exact: Path, file: Path, chosen: dict[str, Form]) -> Path:
        """The file that the gate runs on the CPU. The GPU delegate computes dynamic forms in floating point, which a
        CPU does with the rounded weights unpacked."""
        gpu = self._settings.target == "litert-gpu"
        if not gpu or not any(form.endswith("dynamic") for form in chosen.values()):
            return file
        unpacked = exact.with_suffix(".unpacked.tflite")
        pack(exact, unpacked, lambda weight: chosen[weight.module], unpacked=True)
        return unpacked

    def files(self, bundle: Path, tokenizer: Any, folder: Path) -> dict[str, Path]:
        return {file.stem: file for file in bundle.glob("*.tflite")}

    def manifest(self, bundle: Path) -> dict[str, Any]:
        return {}

    def verify(self, bundle: Path, manifest: Manifest) -> None:
        for network, spec in manifest.networks:
            verify(bundle / f"{network}.tflite", spec)


class _Packed:
    def __init__(self, file: Path, seen: Path, kind: str | NetworkRecipe, chosen: dict[str, Form]) -> None:
        self._file, self._seen = file, seen
        self.label = kind if isinstance(kind, str) else "mixed"
        if not isinstance(kind, str) and len(set(chosen.values())) < 2:
            self.label = next(iter(chosen.values()), "float32")
        self.form: str = coarsest(chosen)
        self.size = file.stat().st_size
        self.runs: dict[str, Run] = {"": self._run}

    def _run(self, inputs: list[dict[str, np.ndarray]], output: str) -> np.ndarray:
        return gate.run(self._seen, inputs, output, DEFAULT_SIGNATURE)

    def close(self) -> None:
        if self._seen != self._file:
            self._seen.unlink()
