"""Inputs to check a network with: a bundle's own, from a short sampling with its runtime, or seeded numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pocketfusion.mobile.delegate.graph import Graph
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
