"""Proves networks on the real GPU delegate: all of it accepted, and the numbers PyTorch's, in FP32 and FP16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from pocketfusion.mobile.convert import DEFAULT_SIGNATURE, convert
from pocketfusion.mobile.delegate.faults import faults
from pocketfusion.mobile.delegate.graph import Graph, load
from pocketfusion.mobile.delegate.oracle import Oracle, Parity, parity
from pocketfusion.mobile.delegate.rules import rejections
from pocketfusion.mobile.devices import Target
from pocketfusion.mobile.pipeline_specs import Samples
from pocketfusion.temporaries import scratch_folder


@dataclass(frozen=True)
class Proof:
    """One network in one form on the delegate.

    `operations`: how many, and `refused`: how many of each kind the rules say fall off the GPU. `faulty`: how many it
    is known to compute wrongly. `partitions`: pieces on the GPU and on the CPU that it is cut into. `accepted`: the
    delegate's own verdict, and `failure` its words if it failed as a whole. `parity`: against PyTorch's stock network
    by precision, where it was accepted. `rewrites`: how often each was applied.
    """

    name: str
    operations: int
    refused: dict[str, int]
    faulty: int
    partitions: tuple[int, int]
    accepted: bool
    failure: str = ""
    parity: dict[str, Parity] = field(default_factory=dict)
    rewrites: dict[str, int] = field(default_factory=dict)

    @property
    def proved(self) -> bool:
        """All on the GPU, and right in every precision that was tried."""
        return (
            self.accepted and not self.refused and not self.faulty and all(one.right for one in self.parity.values())
        )


@torch.no_grad()
def prove(
    name: str,
    module: nn.Module,
    samples: Samples,
    target: Target,
    oracles: Mapping[str, Oracle],
    compile_only: bool = False,
) -> Proof:
    """Converts `module` for `target` and asks the delegate: in every precision of `oracles`, by a run with `samples`.

    With `compile_only` it is asked for its verdict alone.
    """
    expected = {key: value.numpy() for key, value in module.eval()(**samples).items()}
    inputs: dict[str, np.ndarray] = {key: value.numpy() for key, value in samples.items()}
    with scratch_folder("pocketfusion-delegation") as folder:
        file = folder / "network.tflite"
        counts = convert(module, samples, file, target)
        (graph,) = load(file).graphs
        refused = {rejection.operation.index: rejection.operation.kind for rejection in rejections(graph)}
        verdicts, measured = [], {}
        for precision, oracle in oracles.items():
            if compile_only:
                verdicts.append(oracle.compile(file, precision))
                continue
            verdict, outputs = oracle.run(file, inputs, precision, DEFAULT_SIGNATURE)
            verdicts.append(verdict)
            if outputs is not None:
                measured[precision] = parity(precision, oracle.stack.name, [(expected, outputs)])
    return Proof(
        name,
        len(graph.operations),
        dict(Counter(refused.values())),
        len(faults(graph)),
        partitions(graph, set(refused)),
        all(verdict.accepted for verdict in verdicts),
        "; ".join(verdict.failure for verdict in verdicts if verdict.failure),
        measured,
        counts,
    )


def partitions(graph: Graph, refused: set[int]) -> tuple[int, int]:
    """Into how many pieces on the GPU and on the CPU the graph falls if operations of these indices are refused.

    As TensorFlow Lite partitions: all operations of one side that can run, run; then all of the other; in turns.
    """
    pieces = [0, 0]
    known = graph.folded | {tensor.index for tensor in graph.inputs.values()}
    waiting = [operation for operation in graph.operations if not {t.index for t in operation.outputs} <= known]
    side = 1 if waiting and waiting[0].index in refused else 0
    while waiting:
        left = []
        for operation in waiting:  # in the file's order, which is a topological one
            ready = all(tensor.constant or tensor.index in known for tensor in operation.given)
            if ready and (operation.index in refused) == bool(side):
                known |= {tensor.index for tensor in operation.outputs}
            else:
                left.append(operation)
        pieces[side] += len(left) < len(waiting)
        waiting, side = left, 1 - side
    return pieces[0], pieces[1]
