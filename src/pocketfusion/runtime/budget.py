"""Choosing a mode that fits a memory budget, from what each network holds: measured, or estimated from its file.

The estimate's rule, for LiteRT's CPU path with mapped weights: every weight as XNNPACK packs it, the most that the
graph's own tensors hold at once (an operation may write over an input of its size that nothing reads later), LiteRT's
structures, and a margin. A packed weight has its own type, but float16 is packed as float32, and int8 behind a
DEQUANTIZE is held twice as float32, unpacked and packed; of both, pages of the file stay as well. docs/memory.md
compares the rule with measurements.
"""

from __future__ import annotations

import math
import mmap
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import NETWORKS, Bundle
from pocketfusion.runtime.memory import memory, release
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.residency import MODES, Mode
from pocketfusion.runtime.specs import Network as Spec
from pocketfusion.runtime.trust.litert_file import verify

MB = 10**6
#: What the process holds apart from the networks when it has run them: LiteRT's libraries, latents, pictures.
BASE = 40 * MB


def held(bundle: Bundle) -> dict[str, int]:
    """Bytes that each network holds with mapped weights, estimated from its file; PocketfusionError if that is not
    LiteRT's, whose memory alone is known."""
    if bundle.manifest.target == "onnx":
        raise PocketfusionError(
            f"what {bundle.path} takes in ONNX Runtime is not known before: choose a mode instead of a memory budget"
        )
    networks = bundle.manifest.networks
    for name in NETWORKS:
        verify(bundle.file(name), getattr(networks, name))  # before the estimate believes what it says
    return {name: estimate(bundle.file(name)) for name in NETWORKS}


def needed(bundle: Bundle) -> dict[Mode, int]:
    """The most bytes that this process will hold in each mode, itself included.

    `resident` keeps packed weights in the heap, beside the pages of the networks' files.
    """
    networks = held(bundle)
    release()  # what the estimate itself took
    now = memory()
    base = BASE + (now.total if now else 0)
    files = sum(bundle.manifest.files[name].size for name in NETWORKS)
    return {
        "resident": base + sum(networks.values()) + files,
        "pipelined": base + networks["unet"] + max(networks["text_encoder"], networks["decoder"]),
        "sequential": base + max(networks.values()),
    }


def choose_mode(bundle: Bundle, memory_budget: float, mode: Mode | None = None) -> Mode:
    """`mode`, or if None the fastest one, that fits `memory_budget` (MB, 10^6 bytes).

    Raises PocketfusionError for a budget that is no positive number, or that nothing (or not `mode`) fits.
    """
    if not memory_budget > 0 or math.isinf(memory_budget):
        raise PocketfusionError(f"the memory budget is {memory_budget:g} MB: choose a positive number")
    needs = needed(bundle)
    fitting = [m for m in MODES if needs[m] <= memory_budget * MB]
    if mode is None and fitting:
        return fitting[0]
    if mode is None:
        networks = held(bundle)
        largest = max(networks, key=lambda name: networks[name])
        program = needs["sequential"] - networks[largest]
        raise PocketfusionError(
            f"the memory budget is {memory_budget:g} MB, but the largest network ({largest}) alone holds about "
            f"{networks[largest] / MB:.0f} MB and the program {program / MB:.0f} MB: allow "
            f"{math.ceil(needs['sequential'] / MB)} MB, or take a bundle of smaller weights"
        )
    if mode not in fitting:
        hint = f"choose --mode {fitting[0]} or " if fitting else ""
        raise PocketfusionError(
            f"the memory budget is {memory_budget:g} MB, but the mode {mode} needs about {needs[mode] / MB:.0f} MB: "
            f"{hint}allow {math.ceil(needs[mode] / MB)} MB"
        )
    return mode


#: LiteRT's own structures for a graph of some thousand operations, in bytes.
OVERHEAD = 8_000_000
MARGIN = 1.1
_TYPES = schema.TensorType
_BYTES = {_TYPES.FLOAT32: 4.0, _TYPES.FLOAT16: 2.0, _TYPES.INT32: 4.0, _TYPES.INT64: 8.0, _TYPES.INT4: 0.5}
_DEQUANTIZE = schema.BuiltinOperator.DEQUANTIZE
#: Operations that may write over an input: what they read of it at a place is what they write there.
_IN_PLACE = {
    getattr(schema.BuiltinOperator, name)
    for name in (
        *("ADD", "SUB", "MUL", "DIV", "MINIMUM", "MAXIMUM", "SQUARE", "RSQRT", "SQRT", "ABS", "NEG", "EXP", "POW"),
        *("LOGISTIC", "TANH", "GELU", "RELU", "SOFTMAX", "RESHAPE", "SQUARED_DIFFERENCE"),
    )
}


def estimate(file: Path) -> int:
    """Bytes that the network in `file` holds once it is loaded with mapped weights and has run."""
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
        model = schema.Model.GetRootAsModel(content, 0)
        codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
        kinds = [max(code.BuiltinCode(), code.DeprecatedBuiltinCode()) for code in codes]
        graphs = [_Graph(model, model.Subgraphs(i), kinds) for i in range(model.SubgraphsLength())]
        total = max(graph.weights for graph in graphs) + max(graph.live for graph in graphs) + OVERHEAD
        del model, codes, graphs  # they hold views of the mapping
    return round(MARGIN * total)


def measure(file: Path, spec: Spec, num_threads: int = 1) -> int:
    """The same, measured by loading and running the network in a process of its own; Linux only.

    Raises PocketfusionError if the network cannot be run, for one because memory is short.
    """
    command = [sys.executable, "-m", __name__, str(file), spec.model_dump_json(), str(num_threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]
        raise PocketfusionError(f"the memory of {file} cannot be measured ({reason}): see if the machine has enough")
    return int(done.stdout)


def _measure_here(file: Path, spec: Spec, num_threads: int) -> int:
    def held() -> int:
        now = memory()
        if now is None:
            raise PocketfusionError("this system does not tell a process's memory")
        return now.total

    inputs = {t.name: np.ones(t.shape, t.dtype) for t in spec.inputs}
    for _ in range(2):  # the first time also loads LiteRT's libraries
        before = held()
        network = Network(file, spec, num_threads, mapped=True)
        network(**inputs)
        after = held()
        network.close()
    return after - before


class _Graph:
    """`weights` and `live` of one subgraph, in bytes."""

    def __init__(self, model: Any, graph: Any, kinds: list[int]) -> None:
        operators = [graph.Operators(i) for i in range(graph.OperatorsLength())]
        inputs = [[int(t) for t in op.InputsAsNumpy()] if op.InputsLength() else [] for op in operators]
        outputs = [[int(t) for t in op.OutputsAsNumpy()] for op in operators]
        tensors = [graph.Tensors(i) for i in range(graph.TensorsLength())]
        size = [_size(tensor) for tensor in tensors]
        constant = {t for t, tensor in enumerate(tensors) if _has_data(model, tensor)}
        unpacked = set()
        weights = 0.0
        for op, ins, outs in zip(operators, inputs, outputs, strict=True):
            if kinds[op.OpcodeIndex()] == _DEQUANTIZE and ins[0] in constant:
                half = tensors[ins[0]].Type() == _TYPES.FLOAT16
                weights += size[outs[0]] * (1.125 if half else 2.25)  # of each 4 bytes: 4.5 or 9 bytes
                unpacked |= {outs[0], ins[0]}
        weights += sum(size[t] for t in constant - unpacked)
        self.weights = weights
        in_place = [kinds[op.OpcodeIndex()] in _IN_PLACE for op in operators]
        self.live = _most_live(graph, list(zip(inputs, outputs, in_place, strict=True)), size, constant | unpacked)


def _most_live(graph: Any, steps: list[tuple[list[int], list[int], bool]], size: list[float], held: set[int]) -> float:
    """The most bytes of tensors, those in `held` apart, that are alive at one of the `steps`: inputs, outputs, and if
    it may write over an input."""
    last = {t: i for i, (ins, _, _) in enumerate(steps) for t in ins}
    last |= {int(t): len(steps) for t in graph.OutputsAsNumpy()}
    alive = {int(t): size[int(t)] for t in graph.InputsAsNumpy()}
    now, most = sum(alive.values()), sum(alive.values())
    for i, (ins, outs, in_place) in enumerate(steps):
        made = {t: size[t] for t in outs if t not in held}
        dying = [t for t in set(ins) if t in alive and last[t] == i]
        alive |= made
        now += sum(made.values())
        shared = max((size[t] for t in dying if size[t] in made.values()), default=0.0) if in_place else 0.0
        most = max(most, now - shared)
        for t in dying + [t for t in made if t not in last]:
            now -= alive.pop(t)
    return most


def _size(tensor: Any) -> float:
    shape = tensor.ShapeAsNumpy() if tensor.ShapeLength() else []
    return float(np.prod(shape, dtype=np.float64)) * _BYTES.get(tensor.Type(), 1.0)


def _has_data(model: Any, tensor: Any) -> bool:
    buffer = model.Buffers(tensor.Buffer())
    return bool(buffer.DataLength() or buffer.Size())  # the second one lies behind the flatbuffer, beyond 2 GB


if __name__ == "__main__":
    print(_measure_here(Path(sys.argv[1]), Spec.model_validate_json(sys.argv[2]), int(sys.argv[3])))
