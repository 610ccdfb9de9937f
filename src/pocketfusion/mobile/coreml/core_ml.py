"""Core ML's part of an export (`mobile.backends`): packages, their weights, the gate by the executor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pocketfusion.errors import PocketfusionError
from pocketfusion.mobile.convert import forget_trace
from pocketfusion.mobile.coreml import apple, mlpackage
from pocketfusion.mobile.coreml.compression import compress, in_chunks
from pocketfusion.mobile.coreml.executor import Arithmetic, Executor
from pocketfusion.mobile.coreml.program import convert
from pocketfusion.mobile.export_settings import ExportSettings
from pocketfusion.mobile.measure import Run
from pocketfusion.mobile.pipeline_specs import Samples
from pocketfusion.mobile.target_options import OLDEST, check_guidance
from pocketfusion.runtime.manifest import NETWORKS, Manifest

#: A UNet of more bytes is two packages, as a phone loads one at a time into what memory it has left.
CHUNK_ABOVE = 1_000_000_000


class CoreML:
    """`NETWORK.mlpackage`, or the names of Apple's Swift package; a large UNet in two chunks."""

    suffix = ".mlpackage"

    def __init__(self, settings: ExportSettings) -> None:
        self._settings, self._ios = settings, settings.ios or OLDEST
        self._apple = settings.layout == "apple"
        self._packages: dict[str, list[Path]] = {}

    def check(self, guidance: str) -> None:
        check_guidance(self._settings.layout, guidance)

    def convert(self, module: nn.Module, samples: Samples, file: Path) -> None:
        network = file.name.partition("-")[0]
        if self._apple:
            module = apple.wrap(network, module)
            call = apple.inputs(network, {name: x.numpy() for name, x in samples.items()})
            samples = {name: torch.from_numpy(np.array(values)) for name, values in call.items()}
        half = self._settings.kinds()[network] != "float32"
        convert(module, samples, file, self._settings.device, self._ios, half)
        forget_trace()

    def store(self, exact: Path, bundle: Path, network: str, module: nn.Module, kind: Any) -> _Program:
        name = apple.NAMES[network] if self._apple else network
        file = bundle / f"{name}.mlpackage"
        if kind in ("float32", "float16"):
            mlpackage.copy(exact, file)
        else:
            compress(exact, file, kind, self._ios, module)
        found = [file]
        if network == "unet" and mlpackage.size(file) > CHUNK_ABOVE:
            chunk = f"{name}Chunk" if self._apple else f"{name}_chunk"
            found = [bundle / f"{chunk}{number}.mlpackage" for number in (1, 2)]
            in_chunks(file, (found[0], found[1]))
            mlpackage.remove(file)
        self._packages[network] = found
        return _Program(found, network, kind, self._apple)

    def files(self, bundle: Path, tokenizer: Any, folder: Path) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for network in NETWORKS:
            for package in self._packages[network]:
                for file in mlpackage.files(package):  # the program of the first is the network's file
                    name = file.relative_to(bundle).as_posix()
                    found[name if network in found else network] = file
        return found | (apple.write_tokenizer(tokenizer, bundle) if self._apple else {})

    def manifest(self, bundle: Path) -> dict[str, Any]:
        names = {network: [one.name for one in found] for network, found in self._packages.items()}
        return {"coreml": {"ios": self._ios, "layout": self._settings.layout, "packages": names}}

    def verify(self, bundle: Path, manifest: Manifest) -> None:
        """The gate has run every package."""


class _Program:
    def __init__(self, found: list[Path], network: str, kind: str, apple_layout: bool) -> None:
        self.label = self.form = kind
        self.size = sum(mlpackage.size(package) for package in found)
        self._found, self._network, self._apple = found, network, apple_layout
        self.runs: dict[str, Run] = {"": self._in("float32")}
        if kind != "float32":
            self.runs["fp16"] = self._in("rounded")

    def _in(self, arithmetic: Arithmetic) -> Run:
        def run(inputs: list[dict[str, np.ndarray]], output: str) -> np.ndarray:
            executor = Executor(self._found, arithmetic)
            return np.stack([called(executor, self._network, one, self._apple) for one in inputs])

        return run

    def close(self) -> None:
        """The gate keeps nothing."""


def called(executor: Executor, network: str, inputs: dict[str, np.ndarray], apple_layout: bool) -> np.ndarray:
    """The network's output for a bundle's inputs, as a bundle has it; raises PocketfusionError for a program of other
    tensors."""
    given = apple.inputs(network, inputs) if apple_layout else inputs
    found = executor(**given)
    if len(found) != 1:
        raise PocketfusionError(f"the program of {network} gives {', '.join(found)}, not one output: export it again")
    (values,) = found.values()
    return apple.output(network, values) if apple_layout else values
