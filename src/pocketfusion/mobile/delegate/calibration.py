"""A calibration run on the CPU: how large every activation gets, against what fp16 holds.

A phone's GPU computes activations in half precision: above 65,504 there is only infinity, and numbers below 6.1e-5
lose digits or are taken for zero, which a following division or 1/sqrt turns into infinity.

The inputs are a bundle's own, recorded in a short sampling with its runtime, or seeded numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketfusion.mobile.delegate.graph import Graph, Operation, Tensor
from pocketfusion.mobile.delegate.locate import module, risk_cure
from pocketfusion.quiet import quiet
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import Pipeline

Inputs = list[dict[str, np.ndarray]]

PROMPT, SEED, STEPS = "a red apple", 0, 4
#: Encoded besides: a picture takes one call of the text encoder, and masks are of all lengths.
SHORT = "a"
#: Calls of one network that are kept: the first, the last and some between.
CALLS = 3


def recorded(bundle: Path, threads: int) -> dict[str, Inputs]:
    """Inputs of each network's calls (by its name in the bundle) while `PROMPT` is drawn in `STEPS` steps.

    The text encoder is called for `SHORT` too.
    Raises PocketfusionError for a bundle that cannot be run.
    """
    pipeline = Pipeline.load(bundle, threads)
    try:
        with _recording() as calls:
            pipeline.encode(SHORT)
            pipeline.generate(PROMPT, seed=SEED, num_inference_steps=STEPS)
        files = {pipeline.bundle.file(name).resolve(): name for name in ("text_encoder", "unet", "decoder")}
    finally:
        pipeline.close()
    kept: dict[str, Inputs] = {}
    for path, inputs in calls.items():
        indices = np.unique(np.linspace(0, len(inputs) - 1, CALLS).round().astype(int))
        kept[files[path.resolve()]] = [inputs[i] for i in indices]
    return kept


def seeded(graph: Graph) -> Inputs:
    """One call's inputs: standard normal numbers, integers below 100, masks of ones."""
    generator = np.random.default_rng(SEED)
    inputs = {}
    for name, tensor in graph.inputs.items():
        if tensor.dtype == "bool" or "mask" in name:
            inputs[name] = np.ones(tensor.shape, tensor.dtype)
        elif tensor.dtype.startswith("float"):
            inputs[name] = generator.standard_normal(tensor.shape).astype(tensor.dtype)
        else:
            inputs[name] = generator.integers(0, 100, tensor.shape).astype(tensor.dtype)
    return [inputs]


@contextmanager
def _recording() -> Iterator[Mapping[Path, Inputs]]:
    """Every network's inputs at each run, by its file: what was written and fed back until then."""
    calls: dict[Path, Inputs] = {}
    held: dict[int, dict[str, np.ndarray]] = {}
    write, run, feed_back = Network.write, Network.run, Network.feed_back

    def note(self: Network, **inputs: np.ndarray) -> None:
        held.setdefault(id(self), {}).update({name: np.array(values) for name, values in inputs.items()})
        write(self, **inputs)

    def note_feedback(self: Network, name: str) -> None:
        held.setdefault(id(self), {})[name] = np.array(self.read())
        feed_back(self, name)

    def record(self: Network) -> None:
        calls.setdefault(self.path, []).append(dict(held[id(self)]))
        run(self)

    replaced = {"write": note, "run": record, "feed_back": note_feedback}
    for name, function in replaced.items():
        setattr(Network, name, function)
    try:
        yield calls
    finally:
        for name, function in {"write": write, "run": run, "feed_back": feed_back}.items():
            setattr(Network, name, function)


FP16_MAX = 65504.0
FP16_SMALLEST_NORMAL = 2.0**-14
#: Headroom: a value this near to the limit is named too, since calibration sees few inputs.
HEADROOM = 4.0
_DIVIDES = {"RSQRT": 0, "DIV": 1, "LOG": 0}
_SUMS = ("MEAN", "SUM")


@dataclass(frozen=True)
class Risk:
    """An operation whose numbers fp16 may not hold.

    `kind`: "overflow" (its result, or a sum inside a mean, which some drivers add up in fp16), "underflow" (what it
    divides by). `value` is the largest magnitude seen, for underflow the smallest. `certain`: beyond the limit
    itself, not merely near it or in a driver's hands.
    """

    index: int
    operation: str
    module: str
    kind: str
    value: float
    certain: bool
    cure: str


@dataclass(frozen=True)
class Ranges:
    """The calibration of one graph: largest magnitude of any activation, and the operations at risk, worst first."""

    largest: float
    largest_module: str
    risks: tuple[Risk, ...]
    runs: int


def activation_bytes(graph: Graph) -> int:
    """What a calibration holds in memory at once: every activation in float32."""
    return sum(4 * tensor.size for operation in graph.operations for tensor in operation.outputs)


def calibrate(
    path: Path, graph: Graph, signature: str, inputs: Iterable[Mapping[str, np.ndarray]], threads: int = 1
) -> Ranges:
    """Runs the file on each of `inputs` (arrays by the signature's names) and looks at every activation.

    The file's graph must be its only one. Plain kernels, not XNNPACK, which keeps its intermediate results to itself.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    with quiet():
        interpreter = Interpreter(
            str(path),
            num_threads=threads,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        )
        runner = interpreter.get_signature_runner(signature)
    seen: dict[tuple[int, str], Risk] = {}
    largest, where, runs = 0.0, "", 0
    for arrays in inputs:
        runner(**arrays)
        runs += 1
        for operation in graph.operations:
            if graph.folded & {tensor.index for tensor in operation.outputs}:
                continue
            for tensor in operation.outputs:
                if tensor.dtype == "float32" and (value := _largest(interpreter, tensor)) > largest:
                    largest, where = value, module(graph, operation)
            for risk in _risks(interpreter, graph, operation):
                before = seen.get((risk.index, risk.kind))
                if before is None or _worse(risk, before):
                    seen[risk.index, risk.kind] = risk
    ordered = sorted(seen.values(), key=lambda r: (not r.certain, r.kind, -r.value))
    return Ranges(largest, where, tuple(ordered), runs)


def _risks(interpreter: object, graph: Graph, operation: Operation) -> Iterable[Risk]:
    def risk(kind: str, value: float, certain: bool) -> Risk:
        where = module(graph, operation)
        return Risk(operation.index, operation.kind, where, kind, value, certain, risk_cure(operation))

    outputs = [tensor for tensor in operation.outputs if tensor.dtype == "float32"]
    value = max((_largest(interpreter, tensor) for tensor in outputs), default=0.0)
    if value > FP16_MAX / HEADROOM:
        yield risk("overflow", value, value > FP16_MAX)
    elif operation.kind in _SUMS and outputs:
        total = float(np.abs(_values(interpreter, outputs[0])).max(initial=0))
        if operation.kind == "MEAN":
            total *= operation.given[0].size / max(1, outputs[0].size)
        if total > FP16_MAX:
            yield risk("overflow", total, False)
    if operation.kind in _DIVIDES:
        divisor = operation.given[_DIVIDES[operation.kind]]
        if divisor.dtype == "float32" and not divisor.constant:
            smallest = float(np.abs(_values(interpreter, divisor)).min(initial=np.inf))
            if smallest < FP16_SMALLEST_NORMAL:
                yield risk("underflow", smallest, False)


def _worse(one: Risk, other: Risk) -> bool:
    return one.value < other.value if one.kind == "underflow" else one.value > other.value


def _largest(interpreter: object, tensor: Tensor) -> float:
    values = _values(interpreter, tensor)
    if not values.size:
        return 0.0
    largest = float(np.abs(values).max())
    return largest if np.isfinite(largest) else np.inf


def _values(interpreter: object, tensor: Tensor) -> np.ndarray:
    return interpreter.get_tensor(tensor.index)  # type: ignore[attr-defined]
