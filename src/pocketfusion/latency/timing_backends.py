"""Where networks are timed, behind one interface: LiteRT on the CPU, LiteRT on a GPU, PyTorch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pocketfusion.artefact import atomic_file
from pocketfusion.errors import PocketfusionError
from pocketfusion.latency.part_modules import Empty, with_random_weights
from pocketfusion.latency.table import Settings
from pocketfusion.mobile.convert import convert
from pocketfusion.mobile.pipeline_specs import Samples
from pocketfusion.mobile.quantization.packing import FORMS
from pocketfusion.mobile.quantization.weight_forms import quantize
from pocketfusion.quiet import quiet
from pocketfusion.runtime.networks import MAX_THREADS
from pocketfusion.runtime.output import cpu_name

#: Runs a loaded network once, on inputs that are set already.
Runner = Callable[[], Any]


@dataclass(frozen=True)
class Job:
    """One network to time: what it is (also the cache's key), its modules on `meta`, its inputs."""

    key: str
    module: Callable[[], nn.Module]
    samples: Samples


class Backend(Protocol):
    """A runtime on a device. `settings` are stored with what is measured."""

    settings: Settings

    def check(self) -> None:
        """Raises PocketfusionError if this machine cannot run it."""

    def prepare(self, job: Job) -> Path | None:
        """Does what can be done once and kept (an export into the cache); returns the file."""

    def load(self, job: Job) -> Runner:
        """Loads the network. The runner's resources are freed with it."""


def _litert_version() -> str:
    """`ai-edge-litert 2.3.0`."""
    return f"ai-edge-litert {version('ai-edge-litert')}"


class LiteRT:
    """Exports by the exporter that ships, into `cache`; a file there is used again."""

    def __init__(self, settings: Settings, cache: Path):
        if settings.weights not in FORMS:
            raise PocketfusionError(f"--weights is {settings.weights!r}: LiteRT takes {', '.join(FORMS)}")
        self.settings, self.cache = settings, cache

    def check(self) -> None:
        """Nothing that an export does not say."""

    def file(self, job: Job, weights: str) -> Path:
        """Where the cache keeps the job: a name of its key, its batch, weights and the exporter's versions."""
        shapes = {name: (tuple(value.shape), str(value.dtype)) for name, value in job.samples.items()}
        made_by = [version(package) for package in ("litert-torch", "torch", "diffusers", "pocketfusion")]
        digest = hashlib.sha256(repr((job.key, shapes, weights, made_by)).encode()).hexdigest()[:20]
        return self.cache / f"{job.key.partition(':')[0]}-{digest}.tflite"

    def prepare(self, job: Job) -> Path:
        """Exports the job unless the cache has it. Raises PocketfusionError if it does not convert."""
        target = self.file(job, self.settings.weights)
        if target.is_file():
            return target
        exact = self.file(job, "float32")
        if not exact.is_file():
            convert(with_random_weights(job.module()), job.samples, exact)
        if self.settings.weights != "float32":
            if any(True for _ in job.module().parameters()):
                quantize(exact, target, self.settings.weights)
            else:  # nothing to quantise
                with atomic_file(target) as partial:
                    partial.write_bytes(exact.read_bytes())
        return target


class LiteRTCPU(LiteRT):
    """LiteRT's interpreter with XNNPACK. Inputs are set once and a call is `invoke`, so that no copies are timed."""

    def load(self, job: Job) -> Runner:
        from ai_edge_litert.interpreter import Interpreter

        with quiet():
            interpreter = Interpreter(str(self.prepare(job)), num_threads=self.settings.threads)
            interpreter.allocate_tensors()
        for name, details in interpreter.get_signature_runner().get_input_details().items():
            interpreter.set_tensor(details["index"], job.samples[name].numpy())
        return interpreter.invoke


class LiteRTGPU(LiteRT):
    """LiteRT's compiled model on the GPU alone; a call ends when its output has been read back."""

    def check(self) -> None:
        """Raises PocketfusionError if the GPU does not run the smallest network there is."""
        self.load(Job("empty", Empty, {"x": torch.zeros(1, 8)}))

    def load(self, job: Job) -> Runner:
        from ai_edge_litert.compiled_model import CompiledModel
        from ai_edge_litert.hardware_accelerator import HardwareAccelerator

        path = self.prepare(job)
        try:
            with quiet():
                model = CompiledModel.from_file(str(path), hardware_accel=HardwareAccelerator.GPU)
                inputs, outputs = model.create_input_buffers(0), model.create_output_buffers(0)
        except Exception as error:  # the native wrapper raises RuntimeError or ValueError
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise PocketfusionError(
                f"LiteRT's GPU accelerator cannot run {job.key} here ({reason[:160]}): "
                "use a device with a GPU driver that it supports, or --backend litert-cpu"
            ) from None
        (names,) = model.get_signature_list().values()
        for name, buffer in zip(names["inputs"], inputs, strict=True):
            buffer.write(job.samples[name].numpy())
        size = model.get_output_buffer_requirements(0, 0)["buffer_size"] // 4

        def run() -> None:
            model.run_by_index(0, inputs, outputs)
            outputs[0].read(size, "float32")

        return run


class Torch:
    """PyTorch eager, in float32 or bfloat16, without the exporter's rewrites."""

    def __init__(self, settings: Settings):
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if settings.weights not in known:
            raise PocketfusionError(f"--weights is {settings.weights!r}: PyTorch takes {', '.join(known)}")
        self.settings, self.dtype = settings, known[settings.weights]

    def check(self) -> None:
        """It always runs."""

    def prepare(self, job: Job) -> None:
        """Nothing to keep."""

    def load(self, job: Job) -> Runner:
        torch.set_num_threads(self.settings.threads)
        module = with_random_weights(job.module()).to(self.dtype)
        samples = {
            name: value.to(self.dtype) if value.is_floating_point() else value for name, value in job.samples.items()
        }

        def run() -> None:
            with torch.inference_mode():
                module(**samples)

        return run


_KINDS = ("litert-cpu", "litert-gpu", "torch")


def settings_here(name: str, weights: str, threads: int) -> Settings:
    """What a table measured on this machine says of it."""
    runtime = f"torch {torch.__version__}" if name == "torch" else _litert_version()
    return Settings(device=cpu_name(), backend=name, runtime=runtime, weights=weights, threads=threads)


def make_backend(name: str, weights: str, threads: int, cache: Path) -> Backend:
    """The backend of that name on this machine. Raises PocketfusionError for names and weights it does not know."""
    if name not in _KINDS:
        raise PocketfusionError(f"--backend is {name!r}: choose {', '.join(_KINDS)}")
    if not 1 <= threads <= MAX_THREADS:
        raise PocketfusionError(f"--threads is {threads}: choose 1 to {MAX_THREADS}")
    settings = settings_here(name, weights, threads)
    if name == "torch":
        return Torch(settings)
    return LiteRTCPU(settings, cache) if name == "litert-cpu" else LiteRTGPU(settings, cache)
