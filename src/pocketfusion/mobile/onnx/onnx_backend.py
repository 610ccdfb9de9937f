"""ONNX's part of an export (`mobile.backends`): files, their weights, the gate by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from pocketfusion.mobile.convert import forget_trace
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.measure import Run
from pocketfusion.mobile.onnx import diffusers_layout
from pocketfusion.mobile.onnx.graph_export import OPSET, convert
from pocketfusion.mobile.onnx.weight_storage import store
from pocketfusion.mobile.pipeline_specs import Samples
from pocketfusion.mobile.target_options import check_guidance
from pocketfusion.runtime.manifest import NETWORKS, ONNX_DATA, Manifest
from pocketfusion.runtime.runtimes import session

_THREADS = 2  #: of the gate's


class ONNX:
    """`NETWORK.onnx`, with the weights beside it where they are many."""

    suffix = ".exact"

    def __init__(self, settings: ExportSettings) -> None:
        self._settings, self._diffusers = settings, settings.layout == "diffusers"

    def check(self, guidance: str) -> None:
        check_guidance(self._settings.layout, guidance)

    def convert(self, module: nn.Module, samples: Samples, file: Path) -> None:
        dynamic = None
        if self._diffusers:
            network = file.name.partition("-")[0]
            module = diffusers_layout.wrap(network, module)
            samples, dynamic = diffusers_layout.samples(network, samples)
        convert(module, samples, file, self._settings.device, dynamic)
        forget_trace()

    def store(self, exact: Path, bundle: Path, network: str, module: nn.Module, kind: Any) -> _Stored:
        file = self._file(bundle, network)
        file.parent.mkdir(exist_ok=True)
        store(exact, file, kind)
        return _Stored(file, kind, network if self._diffusers else None)

    def _file(self, bundle: Path, network: str) -> Path:
        return bundle / (f"{diffusers_layout.FOLDERS[network]}/model.onnx" if self._diffusers else f"{network}.onnx")

    def files(self, bundle: Path, tokenizer: Any, folder: Path) -> dict[str, Path]:
        found = {network: self._file(bundle, network) for network in NETWORKS}
        apart = {f"{name}.data": data for name, file in found.items() if (data := _data(file)).exists()}
        return found | apart | (diffusers_layout.write_index(folder, bundle) if self._diffusers else {})

    def manifest(self, bundle: Path) -> dict[str, Any]:
        return {"onnx": {"opset": OPSET, "layout": self._settings.layout}}

    def verify(self, bundle: Path, manifest: Manifest) -> None:
        """The gate has run every file."""


class _Stored:
    def __init__(self, file: Path, kind: str, diffusers: str | None) -> None:
        """`diffusers`: the network whose tensors are those of that layout."""
        self._file, self._diffusers = file, diffusers
        self.label = self.form = kind
        self.size = sum(part.stat().st_size for part in (file, _data(file)) if part.exists())
        self.runs: dict[str, Run] = {"": self._run}

    def _run(self, inputs: list[dict[str, np.ndarray]], output: str) -> np.ndarray:
        file, network = session(self._file, _THREADS), self._diffusers
        if network is None:
            return np.stack([file.run([output], one)[0] for one in inputs])
        output, calls = diffusers_layout.OUTPUTS[network], [diffusers_layout.inputs(network, one) for one in inputs]
        return np.stack([diffusers_layout.output(network, file.run([output], one)[0]) for one in calls])

    def close(self) -> None:
        """The gate keeps nothing."""


def _data(file: Path) -> Path:
    return file.with_name(file.name + ONNX_DATA)
