"""ONNX's part of an export (`mobile.backends`): files, their weights, the gate by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.measure import Run
from pocketfusion.mobile.onnx.graph_export import OPSET, convert
from pocketfusion.mobile.onnx.weight_storage import store
from pocketfusion.mobile.specs import Samples
from pocketfusion.runtime.manifest import NETWORKS, ONNX_DATA, Manifest
from pocketfusion.runtime.onnx_engine import session

_THREADS = 2  #: of the gate's


class ONNX:
    """`NETWORK.onnx`, with the weights beside it where they are many."""

    suffix = ".exact"

    def __init__(self, settings: ExportSettings) -> None:
        self._settings = settings

    def check(self, guidance: str) -> None:
        """Whatever can be loaded."""

    def convert(self, module: nn.Module, samples: Samples, file: Path) -> None:
        convert(module, samples, file, self._settings.device)

    def store(self, exact: Path, bundle: Path, network: str, module: nn.Module, kind: Any) -> _Stored:
        file = bundle / f"{network}.onnx"
        store(exact, file, kind)
        return _Stored(file, kind)

    def files(self, bundle: Path, tokenizer: Any) -> dict[str, Path]:
        found = {network: bundle / f"{network}.onnx" for network in NETWORKS}
        apart = {f"{name}.data": data for name, file in found.items() if (data := _data(file)).exists()}
        return found | apart

    def manifest(self, bundle: Path) -> dict[str, Any]:
        return {"onnx": {"opset": OPSET, "layout": self._settings.layout}}

    def verify(self, bundle: Path, manifest: Manifest) -> None:
        """The gate has run every file."""


class _Stored:
    def __init__(self, file: Path, kind: str) -> None:
        self._file = file
        self.label = self.form = kind
        self.size = sum(part.stat().st_size for part in (file, _data(file)) if part.exists())
        self.runs: dict[str, Run] = {"": self._run}

    def _run(self, inputs: list[dict[str, np.ndarray]], output: str) -> np.ndarray:
        network = session(self._file, _THREADS)
        return np.stack([network.run([output], one)[0] for one in inputs])

    def close(self) -> None:
        """The gate keeps nothing."""


def _data(file: Path) -> Path:
    return file.with_name(file.name + ONNX_DATA)
