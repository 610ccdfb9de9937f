"""The runtimes that draw here, by name: whose bundles each takes, how it loads a network, its version.

LiteRT is part of every installation, the others are extras. Each is imported when a network is first loaded with it.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from pocketfusion.errors import INSTALL_ONNX, INSTALL_OPENVINO, PocketfusionError
from pocketfusion.runtime.engines import Engine
from pocketfusion.runtime.manifest import Manifest
from pocketfusion.runtime.specs import Network

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
        from pocketfusion.runtime.onnx_engine import OnnxRuntime

        return OnnxRuntime(path, spec, num_threads)
    from pocketfusion.runtime.openvino_engine import OpenVINO

    return OpenVINO(path, spec, num_threads, bfloat16=runtime == "openvino-bf16")


def runtime_version(runtime: RuntimeName) -> str:
    """Its package and version, as measurements name it."""
    package = _PACKAGES.get(runtime, "openvino")
    return f"{package} {version(package)}" + (" in bfloat16" if runtime == "openvino-bf16" else "")
