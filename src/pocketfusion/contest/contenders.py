"""The runtimes that `bench --all` compares: how each gets the UNet's file, loads it, and calls it.

A contender is named `runtime:weights`. `prepare` runs in a process of its own, which has torch; `load` in another,
which has of the libraries what the runtime needs, so that its memory is the runtime's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet

if TYPE_CHECKING:
    from pocketfusion.mobile.devices import TargetName

Call = dict[str, np.ndarray]
#: A loaded UNet: from its inputs, by a bundle's names, to its prediction [B, H, W, C].
Loaded = Callable[[Call], np.ndarray]


@dataclass(frozen=True)
class Subject:
    """The UNet: its model folder, the pictures' size (None: the folder's own), threads, where files are kept."""

    folder: str
    size: tuple[int, int] | None
    threads: int
    cache: str


@dataclass(frozen=True)
class Prepared:
    """What a runtime loads: files, the graph first, and what it has to know of them, as JSON values."""

    files: tuple[str, ...]
    about: dict[str, Any]

    @property
    def size(self) -> int:
        """Of the files, in bytes."""
        return sum(Path(file).stat().st_size for file in self.files)


class PyTorch:
    """The folder's own UNet, eager or by `torch.compile`."""

    packages, extra = ("torch",), "compress"
    forms = ("float32", "bfloat16")

    def __init__(self, label: str, compiled: bool) -> None:
        self.label, self._compiled = label, compiled

    def prepare(self, subject: Subject, weights: str) -> Prepared:
        from pocketfusion.folder import weight_files

        return Prepared(tuple(map(str, weight_files(Path(subject.folder) / "unet")[0])), {})

    def load(self, subject: Subject, prepared: Prepared, weights: str) -> Loaded:
        import torch

        from pocketfusion.contest.unet_subject import open_unet

        torch.set_num_threads(subject.threads)
        dtype = getattr(torch, weights)
        network: Any = open_unet(subject)[0].to(dtype)
        if self._compiled:
            network = torch.compile(network)

        def call(inputs: Call) -> np.ndarray:
            given = {name: torch.from_numpy(values) for name, values in inputs.items()}
            # the timestep stays as it is: bfloat16 has no 981, and diffusers computes its sines in float32
            given = {name: x if name == "timestep" else x.to(dtype) for name, x in given.items()}
            with torch.inference_mode():
                return network(**given)["noise_pred"].float().numpy()

        return call


class Exported:
    """A file that this project exports for `target`, in one of the runtimes that bundles are drawn with.

    OpenVINO's `bfloat16` is how it computes: its file is float32's.
    """

    def __init__(
        self,
        label: str,
        target: TargetName,
        forms: tuple[str, ...],
        packages: tuple[str, ...] = ("litert_torch",),
        extra: str = "compress",
        runtime: str = "litert",
    ) -> None:
        self.label, self.forms, self.packages, self.extra = label, forms, packages, extra
        self._target, self._runtime = target, runtime

    def prepare(self, subject: Subject, weights: str) -> Prepared:
        from pocketfusion.artefact import atomic_folder
        from pocketfusion.contest.unet_subject import open_unet
        from pocketfusion.mobile.backends import backend_of
        from pocketfusion.mobile.export_settings import ExportSettings
        from pocketfusion.mobile.pipeline_specs import tensor_specs

        settings, form = ExportSettings(target=self._target, size=subject.size), _form(weights)
        backend = backend_of(settings)
        wrapped, samples, time = open_unet(subject, "outside" if self._target == "litert-gpu" else "inside")
        key = f"unet-{settings.conversion_key(Path(subject.folder), 'unet')}"
        exact, stored = Path(subject.cache) / f"{key}{backend.suffix}", Path(subject.cache) / f"{key}-{form}"
        if not exact.exists():
            backend.convert(wrapped, samples, exact)
        if not stored.exists():
            with atomic_folder(stored) as partial:
                backend.store(exact, partial, "unet", wrapped, form).close()
        outputs = tensor_specs({"noise_pred": samples["sample"]})
        about = {
            "inputs": [one.model_dump() for one in tensor_specs(samples)],
            "outputs": [one.model_dump() for one in outputs],
            "time": time,
        }
        return Prepared(tuple(str(file) for file in sorted(stored.iterdir())), about)

    def load(self, subject: Subject, prepared: Prepared, weights: str) -> Loaded:
        from pocketfusion.runtime.denoise import timestep_embedding
        from pocketfusion.runtime.specs import Network, TimeEmbedding

        about = prepared.about
        time = TimeEmbedding.model_validate(about["time"]) if about["time"] else None
        spec = Network.model_validate(
            {"inputs": about["inputs"], "outputs": about["outputs"], "parameters": 0, "macs": 0}
            | {"weights": _form(weights), "gpu_precision": "fp32"}
        )
        with quiet():
            engine = self._engine(Path(prepared.files[0]), spec, subject.threads, weights)

        def call(inputs: Call) -> np.ndarray:
            given = dict(inputs)
            if time is not None:
                steps = given.pop("timestep")
                given["timestep_embedding"] = np.concatenate([timestep_embedding(float(t), time) for t in steps])
            for name, values in given.items():
                engine.write(name, values)
            engine.run()
            return np.array(engine.read())

        return call

    def _engine(self, path: Path, spec: Any, threads: int, weights: str) -> Any:
        if self._runtime != "litert":
            from pocketfusion.runtime.runtimes import load_engine

            name: Any = f"{self._runtime}-bf16" if weights == "bfloat16" else self._runtime
            return load_engine(name, path, spec, threads)
        from pocketfusion.runtime.engines import Compiled, Interpreted, gpu_options
        from pocketfusion.runtime.trust.litert_file import verify

        signature = verify(path, spec)
        if self._target == "litert-gpu":
            return Compiled(path, spec, signature, gpu_options(spec))
        return Interpreted(path, spec, signature, threads)


def _form(weights: str) -> str:
    """The form of the file's weights."""
    return "float32" if weights == "bfloat16" else weights


CONTENDERS: dict[str, PyTorch | Exported] = {
    "torch": PyTorch("PyTorch eager", compiled=False),
    "torch-compiled": PyTorch("PyTorch compiled", compiled=True),
    "litert-cpu": Exported("LiteRT CPU", "litert-cpu", ("float32", "float16", "int8", "int8-dynamic")),
    "litert-gpu": Exported("LiteRT GPU", "litert-gpu", ("float32",)),
    "onnxruntime": Exported(
        "ONNX Runtime",
        "onnx",
        ("float32", "float16", "int8"),
        ("onnx", "onnxscript", "onnxruntime"),
        "compress,onnx",
        "onnxruntime",
    ),
    "openvino": Exported(
        "OpenVINO",
        "onnx",
        ("float32", "bfloat16", "int8"),
        ("onnx", "onnxscript", "openvino"),
        "compress,onnx,openvino",
        "openvino",
    ),
}
#: What all others are compared with, and all that are compared where none is chosen.
REFERENCE = "torch:float32"
ALL = (
    *(REFERENCE, "torch:bfloat16", "torch-compiled:float32", "torch-compiled:bfloat16"),
    *("litert-cpu:float32", "litert-cpu:int8-dynamic", "litert-gpu:float32"),
    *("onnxruntime:float32", "openvino:float32", "openvino:bfloat16"),
)


def parse(names: str | None) -> tuple[str, ...]:
    """The contenders of a list with commas, the reference first; raises PocketfusionError for an unknown one."""
    chosen = ALL if names is None else tuple(name.strip() for name in names.split(","))
    for name in chosen:
        runtime, _, weights = name.partition(":")
        if runtime not in CONTENDERS or weights not in CONTENDERS[runtime].forms:
            known = [f"{key}:{form}" for key, one in CONTENDERS.items() for form in one.forms]
            raise PocketfusionError(f"--only has {name!r}: choose among {', '.join(known)}")
    return tuple(dict.fromkeys((REFERENCE, *chosen)))


def missing(name: str) -> str | None:
    """Why the contender cannot run in this installation, with the command that helps; None if it can."""
    one = CONTENDERS[name.partition(":")[0]]
    absent = [package for package in one.packages if find_spec(package) is None]
    if not absent:
        return None
    return f"{', '.join(absent)} is not installed: pip install '.[{one.extra}]' in pocketfusion's clone"
