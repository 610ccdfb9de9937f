"""`check` of a Core ML bundle: a picture drawn with its packages by the executor, in fp32 and rounded to fp16.

Says whether every operation is known, every tensor as the manifest has it, and what rounding to fp16 costs each
network on the picture's own inputs. Apple's kernels are not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocketfusion.errors import PocketfusionError
from pocketfusion.likeness import EQUAL, psnr
from pocketfusion.mobile.coreml.core_ml import called
from pocketfusion.mobile.coreml.executor import Arithmetic, Executor
from pocketfusion.mobile.gate import MIN_SQNR, sqnr
from pocketfusion.runtime.manifest import NETWORKS, Bundle
from pocketfusion.runtime.pipeline import Pipeline

PROMPT, SEED, STEPS = "a red apple", 0, 2
#: Least SQNR in dB of rounded arithmetic against fp32's on the same weights.
LEAST = MIN_SQNR["float16"]


@dataclass(frozen=True)
class ProgramCheck:
    """A network's packages: operations computed, by kind, and what fp16 keeps of fp32's results, in dB (None: it
    computes in fp32)."""

    network: str
    packages: tuple[str, ...]
    operations: dict[str, int]
    fp16_sqnr_db: float | None

    @property
    def passed(self) -> bool:
        return self.fp16_sqnr_db is None or self.fp16_sqnr_db >= LEAST


@dataclass(frozen=True)
class Verdict:
    """The whole check: the networks', and the PSNR in dB of the picture in fp16 to that in fp32 (None: not finite)."""

    path: Path
    ios: int
    layout: str
    networks: tuple[ProgramCheck, ...]
    picture_psnr_db: float | None

    @property
    def passed(self) -> bool:
        return self.picture_psnr_db is not None and all(one.passed for one in self.networks)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values; a number that is not finite becomes null."""
        networks = [asdict(one) | {"passed": one.passed} for one in self.networks]
        for one in networks:
            if one["fp16_sqnr_db"] == float("-inf"):
                one["fp16_sqnr_db"] = None
        about = {"path": str(self.path), "target": "coreml", "ios": self.ios, "layout": self.layout}
        return about | {"passed": self.passed, "networks": networks, "picture_psnr_db": self.picture_psnr_db}


def judge(path: Path, progress: Callable[[str], None] = lambda stage: None) -> Verdict:
    """Checks the Core ML bundle at `path`; `progress` is told each stage.

    Raises PocketfusionError for a damaged bundle, an unknown operation, tensors other than the manifest's, and a
    network that gives NaN or infinity in fp32.
    """
    bundle = Bundle.open(path, any_runtime=True)
    spec = bundle.manifest.coreml
    assert spec is not None
    progress("drawing a picture in fp32")
    exact = _Executed(bundle, "float32")
    picture = exact.generate(PROMPT, seed=SEED, num_inference_steps=STEPS).images[0]
    checks = []
    for network in NETWORKS:
        progress(f"{network.replace('_', ' ')}: in fp16")
        checks.append(_compared(bundle, network, exact.calls[network]))
    progress("drawing a picture in fp16")
    try:
        half = _Executed(bundle, "rounded").generate(PROMPT, seed=SEED, num_inference_steps=STEPS).images[0]
    except PocketfusionError:  # NaN, which a network's figure has told already
        return Verdict(path, spec.ios, spec.layout, tuple(checks), None)
    alike = min(EQUAL, psnr(np.asarray(picture), np.asarray(half)))
    return Verdict(path, spec.ios, spec.layout, tuple(checks), round(alike, 2))


def _compared(bundle: Bundle, network: str, calls: list[_Call]) -> ProgramCheck:
    rounded = _executor(bundle, network, "rounded")
    names = tuple(bundle.manifest.coreml.packages[network]) if bundle.manifest.coreml else ()  # type: ignore[index]
    if getattr(bundle.manifest.networks, network).weights == "float32":
        return ProgramCheck(network, names, rounded.operations, None)
    expected = np.concatenate([_heard(one.inputs, one.output) for one in calls])
    apple = bundle.manifest.coreml is not None and bundle.manifest.coreml.layout == "apple"
    measured = np.concatenate([_heard(one.inputs, called(rounded, network, one.inputs, apple)) for one in calls])
    return ProgramCheck(network, names, rounded.operations, round(sqnr(expected, measured), 2))


def _heard(inputs: dict[str, np.ndarray], output: np.ndarray) -> np.ndarray:
    """Of a text encoder's states those of the prompt's tokens: nothing trained the others."""
    mask = inputs.get("attention_mask")
    return output.reshape(-1) if mask is None else output[mask.astype(bool)].reshape(-1)


@dataclass(frozen=True)
class _Call:
    inputs: dict[str, np.ndarray]
    output: np.ndarray


def _executor(bundle: Bundle, network: str, arithmetic: Arithmetic) -> Executor:
    assert bundle.manifest.coreml is not None
    packages = bundle.manifest.coreml.packages[network]  # type: ignore[index]
    return Executor([bundle.path / package for package in packages], arithmetic)


@dataclass
class _Network:
    """A network as the runtime's pipeline uses one (`runtime.networks.Network`)."""

    path: Path
    spec: Any
    execute: Callable[[dict[str, np.ndarray]], np.ndarray]
    calls: list[_Call]
    held: dict[str, np.ndarray] = field(default_factory=dict)
    made: Any = None

    def write(self, **inputs: np.ndarray) -> None:
        self.held |= {name: np.array(values) for name, values in inputs.items()}

    def run(self) -> None:
        self.made = self.execute(self.held)
        self.calls.append(_Call(dict(self.held), self.made))

    def read(self) -> np.ndarray:
        return np.array(self.made)

    def feed_back(self, name: str) -> None:
        self.held[name] = self.made

    def __call__(self, **inputs: np.ndarray) -> np.ndarray:
        self.write(**inputs)
        self.run()
        return self.read()

    def close(self) -> None:
        self.made = None


class _Executed(Pipeline):
    """The runtime's pipeline over the executor: the same tokens, noise, sampler and tiles."""

    def __init__(self, bundle: Bundle, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        self.calls: dict[str, list[_Call]] = {network: [] for network in NETWORKS}
        super().__init__(bundle, mode="sequential")

    def _load_network(self, name: str) -> Any:
        executor, spec = _executor(self.bundle, name, self._arithmetic), getattr(self.manifest.networks, name)
        assert self.manifest.coreml is not None
        apple = self.manifest.coreml.layout == "apple"

        def execute(inputs: dict[str, np.ndarray]) -> np.ndarray:
            found = called(executor, name, inputs, apple)
            if list(found.shape) != spec.outputs[0].shape:
                raise PocketfusionError(
                    f"{self.bundle.path}: the {name} gives {list(found.shape)}, and the manifest says "
                    f"{spec.outputs[0].shape}: export it again"
                )
            return found

        return _Network(self.bundle.path / f"{name}", spec, execute, self.calls[name])
