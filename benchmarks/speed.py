"""The figures of docs/speed.md, printed again: networks by operation, loading with and without kept weights, starts,
guidance in one call and in two, and the targets.

Usage: python benchmarks/speed.py [--bundle BUNDLE] [--full DIR] [--only PART,...] [--runs 5] [--threads 1]

Of the embedded bundle, which takes seconds. `--full DIR` adds what SD-1.5 is made into, with random weights at
512x512: its half decoder and SnapFusion's UNet in `int8-dynamic`, the text encoder in `float16`. They are converted
into DIR unless it has them (9 GB of memory, some fifteen minutes). The last two parts, `calls` and `targets`, want it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import targets
from op_profile import profile
from pocketfusion.quiet import quiet
from pocketfusion.runtime.engines import Environment, cpu_options
from pocketfusion.runtime.manifest import NETWORKS, Bundle, embedded_bundle
from pocketfusion.runtime.output import cpu_name

MODELS = Path(__file__).parents[1] / "models" / "emoji"
#: Networks of full size, and the form of their weights.
FULL = {"text": "float16", "UNet": "int8-dynamic", "UNet, batch 2": "int8-dynamic", "decoder": "int8-dynamic"}
PARTS = ("profiles", "loading", "starts", "calls", "targets")


def full_size(folder: Path) -> dict[str, Path]:
    """SD-1.5's text encoder, SnapFusion's UNet and the half decoder in `folder`, converted if they are missing."""
    files = {name: folder / f"{name.replace(', ', '-').replace(' ', '-').lower()}.tflite" for name in FULL}
    missing = [name for name, file in files.items() if not file.exists()]
    if not missing:
        return files
    from decoder_latency import decoder_job
    from pocketfusion.cli.shared import quiet_libraries

    quiet_libraries()
    from pocketfusion.latency.part_modules import with_random_weights
    from pocketfusion.latency.profiling import whole_job
    from pocketfusion.latency.target import load_target
    from pocketfusion.mobile.convert import convert
    from pocketfusion.mobile.quantization.weight_forms import quantize
    from pocketfusion.models.elastic.presets import snapfusion

    folder.mkdir(parents=True, exist_ok=True)
    target = load_target("sd-1.5")
    jobs = {
        "text": target.networks()[0]["text_encoder"],
        "UNet": whole_job(target, snapfusion(target.config), 1),
        "UNet, batch 2": whole_job(target, snapfusion(target.config), 2),
        "decoder": decoder_job("sd-1.5:half"),
    }
    for name in missing:
        exact = files[name].with_suffix(".float32.tflite")
        convert(with_random_weights(jobs[name].module()), jobs[name].samples, exact)
        quantize(exact, files[name], FULL[name])
        exact.unlink()
    return files


def embedded_forms(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The embedded model's UNets, base and final, for a call of batch 2 and for two of 1; kept in `folder`."""
    from pocketfusion.latency.profiling import whole_job
    from pocketfusion.latency.target import load_target
    from pocketfusion.latency.timing_backends import LiteRTCPU, settings_here

    backend, found = LiteRTCPU(settings_here("litert-cpu", "int8-dynamic", 1), folder), {}
    for name in ("base", "final"):
        target = load_target(str(MODELS / name))
        two, one = (backend.prepare(whole_job(target, target.architecture, batch)) for batch in (2, 1))
        found[f"the emoji model's {name}"] = two, one
    return found


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
    parser.add_argument("--only", default=",".join(PARTS), help="parts, of " + ", ".join(PARTS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    parts, runs, threads = args.only.split(","), args.runs, args.threads
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only has {unknown[0]!r}: choose among {', '.join(PARTS)}")
    bundle = Bundle.open(args.bundle or embedded_bundle())
    full = full_size(args.full) if args.full else {}
    files = [bundle.file(name) for name in NETWORKS] + list(full.values())
    print(f"{cpu_name()}, LiteRT on {threads} threads; {runs} calls after one, in milliseconds", flush=True)
    for file in files if "profiles" in parts else ():
        found = profile(file, runs, threads)
        print(f"\n{file}: {1000 * found.wall:.1f} a call, {1000 * found.processor:.1f} of the processor\n")
        print("\n".join(found.rows()))
    if "loading" in parts:
        print("\n| loading | weights packed | weights kept |\n|---|---|---|")
        for file in files:
            packed, kept = loading(file, threads)
            print(f"| {file.name} | {packed:.2f} s | {kept:.2f} s |")
    if "starts" in parts:
        print("\n| start | seconds |\n|---|---|")
        for arguments in (("-c", "import pocketfusion"), ("-m", "pocketfusion", "generate", "--help")):
            print(f"| `{' '.join(arguments)}` | {start_of(*arguments, runs=runs):.2f} |")
    if not full:
        return
    if "calls" in parts:
        forms = {"SnapFusion's UNet": (full["UNet, batch 2"], full["UNet"])}
        print("", *targets.calls(forms, runs, threads), sep="\n", flush=True)
        print("", *targets.calls(embedded_forms(args.full), 10 * runs, threads), sep="\n", flush=True)
    if "targets" in parts:
        del full["UNet, batch 2"]
        print("", *targets.pictures(full, runs, threads), sep="\n", flush=True)
        print("", *targets.embedded(MODELS, args.full, runs, threads), sep="\n", flush=True)


if __name__ == "__main__":
    main()
