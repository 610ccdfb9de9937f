"""Ways to store an ONNX bundle's weights in 8 bits or fewer, against float32: file size, SQNR, time of a UNet's call.

Usage: python benchmarks/onnx_int8.py MODEL WORK [--runs 40]

MODEL is exported once, as float32, to WORK/float32; the other forms are made from those files. `int8` is what
`export` writes (`mobile.onnx.weight_storage`); `dynamic` is onnxruntime's quantize_dynamic, which rounds activations
too, of all that it takes (weights of uint8) and of matrix products and embeddings alone (int8, products with a scale
for each channel); `MatMulNBits` is onnxruntime's quantiser of matrix products in blocks of 32.

SQNR in dB: each network by itself, its output against float32's on the inputs of two drawn pictures. Times: one
thread, in turns, the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from pocketfusion.mobile.gate import sqnr
from pocketfusion.mobile.onnx.graph_export import GRAPH
from pocketfusion.mobile.onnx.weight_storage import store
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import NETWORKS
from pocketfusion.runtime.networks import Network
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.runtimes import session

PROMPTS = ("a red apple", "a cat with sunglasses, smiling")
Calls = dict[str, list[dict[str, np.ndarray]]]


def _int8(source: Path, target: Path) -> None:
    exact = target.with_suffix(".exact")
    exact.mkdir(exist_ok=True)
    (exact / GRAPH).write_bytes(source.read_bytes())
    store(exact, target, "int8")


def _dynamic(source: Path, target: Path) -> None:
    quantize_dynamic(source, target, weight_type=QuantType.QUInt8)


def _dynamic_products(source: Path, target: Path) -> None:
    quantize_dynamic(source, target, ["MatMul", "Gather"], per_channel=True, weight_type=QuantType.QInt8)


def _blocks(bits: int) -> Callable[[Path, Path], None]:
    def make(source: Path, target: Path) -> None:
        quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), bits, block_size=32, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))

    return make


FORMS: dict[str, Callable[[Path, Path], None]] = {
    "int8": _int8,
    "dynamic": _dynamic,
    "dynamic, products": _dynamic_products,
    "MatMulNBits 8": _blocks(8),
    "MatMulNBits 4": _blocks(4),
}


def recorded(bundle: Path) -> Calls:
    """The inputs of every network's calls while the prompts are drawn, by their tensors' names."""
    calls: Calls = defaultdict(list)

    class Recorder(Pipeline):
        def _load_network(self, name: str) -> Network:
            network, inputs = super()._load_network(name), dict[str, np.ndarray]()
            write, run = network.write, network.run

            def written(**given: Any) -> None:
                inputs.update({key: np.array(value) for key, value in given.items()})
                write(**given)

            def ran() -> None:
                calls[name].append(dict(inputs))
                run()

            network.write, network.run = written, ran  # type: ignore[method-assign]
            return network

    with Recorder.load(bundle, 1, mode="resident") as pipeline:
        for seed, prompt in enumerate(PROMPTS):
            pipeline.generate(prompt, seed=seed)
    return calls


def main() -> None:
    """Parses the command line, makes the files, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--runs", type=int, default=40, help="rounds, each of which calls the UNet once in every form")
    given = parser.parse_args()
    exact = given.work / "float32"
    if not exact.exists():
        from pocketfusion.cli.shared import quiet_libraries

        quiet_libraries()
        from pocketfusion.mobile.export import export

        given.work.mkdir(exist_ok=True)
        export(given.model, exact, target="onnx", gate_steps=1)
    calls = recorded(exact)
    files = {"float32": {name: exact / f"{name}.onnx" for name in NETWORKS}}
    for form, make in FORMS.items():
        folder = given.work / form.replace(", ", "-").replace(" ", "-")
        folder.mkdir(exist_ok=True)
        files[form] = {name: folder / f"{name}.onnx" for name in NETWORKS}
        for name, file in files[form].items():
            with quiet():
                make(files["float32"][name], file)
    right: dict[str, np.ndarray] = {}
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for form, networks in files.items():
        for name, file in networks.items():
            network = session(file, 1)
            outputs = np.stack([network.run(None, call)[0] for call in calls[name]])
            found[form][name] = sqnr(right.setdefault(name, outputs), outputs)
    unets = {form: session(networks["unet"], 1) for form, networks in files.items()}
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(given.runs):
        call = calls["unet"][turn % len(calls["unet"])]
        for form, unet in unets.items():
            began = time.perf_counter()
            unet.run(None, call)
            seconds[form].append(time.perf_counter() - began)
    print(f"| form | MB | {' | '.join(name.replace('_', ' ') for name in NETWORKS)} | UNet's call, ms |")
    print(f"|{'---|' * (len(NETWORKS) + 3)}")
    for form, networks in files.items():
        size = sum(file.stat().st_size for file in networks.values()) / 1e6
        kept = " | ".join("" if form == "float32" else f"{found[form][name]:.1f}" for name in NETWORKS)
        print(f"| `{form}` | {size:.1f} | {kept} | {1000 * statistics.median(seconds[form]):.1f} |")


if __name__ == "__main__":
    main()
