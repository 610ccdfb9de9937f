"""The figures of docs/speed.md, printed again: networks by operation, loading with and without kept weights, starts.

Usage: python benchmarks/speed.py [--bundle BUNDLE] [--full DIR] [--runs 5] [--threads 1]

Of the embedded bundle, which takes seconds. `--full DIR` adds SD-1.5's half decoder and SnapFusion's UNet with random
weights in `int8-dynamic`, 512x512, which are converted into DIR unless it has them (10 GB of memory,
some ten minutes).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from op_profile import profile
from pocketfusion.quiet import quiet
from pocketfusion.runtime.engines import Environment, cpu_options
from pocketfusion.runtime.manifest import NETWORKS, Bundle, embedded_bundle
from pocketfusion.runtime.output import cpu_name


def full_size(folder: Path) -> list[Path]:
    """The two networks' files in `folder`, converted if they are missing."""
    files = [folder / "decoder-half.tflite", folder / "unet-snapfusion.tflite"]
    if all(file.exists() for file in files):
        return files
    from decoder_latency import decoder_job
    from pocketfusion.latency.part_modules import unet_module, unet_samples, with_random_weights
    from pocketfusion.mobile.convert import convert
    from pocketfusion.mobile.quantization.weight_forms import quantize
    from pocketfusion.models.elastic.presets import snapfusion
    from pocketfusion.models.sd_configs import CONFIGS

    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS["sd-1.5"]["unet"] | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    decoder = decoder_job("sd-1.5:half")
    jobs = (
        (decoder.module(), decoder.samples),
        (unet_module(config, snapfusion(config)), unet_samples(config, 77, 1)),
    )
    for file, (module, samples) in zip(files, jobs, strict=True):
        exact = file.with_suffix(".float32.tflite")
        convert(with_random_weights(module), samples, exact)
        quantize(exact, file, "int8-dynamic")
        exact.unlink()
    return files


def loading(file: Path, threads: int) -> tuple[float, float]:
    """Seconds to load `file` with packed weights that must be made, and that are there."""
    from ai_edge_litert.compiled_model import CompiledModel

    seconds = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        environment = Environment.create()
        for _ in range(2):
            start = time.perf_counter()
            options = cpu_options(threads, Path(folder) / "packed")
            CompiledModel.from_file(str(file), environment=environment, options=options).close()
            seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[1]


def start_of(*arguments: str, runs: int) -> float:
    """Median seconds of a Python process."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--full", type=Path, metavar="DIR")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle or embedded_bundle())
    files = [bundle.file(name) for name in NETWORKS] + (full_size(args.full) if args.full else [])
    print(f"{cpu_name()}, LiteRT on {args.threads} threads; the mean of {args.runs} calls after one, in milliseconds")
    for file in files:
        found = profile(file, args.runs, args.threads)
        print(f"\n{file}: {1000 * found.wall:.1f} a call, {1000 * found.processor:.1f} of the processor\n")
        print("\n".join(found.rows()))
    print("\n| loading | weights packed | weights kept |\n|---|---|---|")
    for file in files:
        packed, kept = loading(file, args.threads)
        print(f"| {file.name} | {packed:.2f} s | {kept:.2f} s |")
    print("\n| start | seconds |\n|---|---|")
    for arguments in (("-c", "import pocketfusion"), ("-m", "pocketfusion", "generate", "--help")):
        print(f"| `{' '.join(arguments)}` | {start_of(*arguments, runs=args.runs):.2f} |")


if __name__ == "__main__":
    main()
