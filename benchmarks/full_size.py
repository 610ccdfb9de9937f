"""One guided step (batch 2) of a full-size UNet and its `snapfusion` preset: LiteRT on the CPU and PyTorch, in turns.

Usage: python benchmarks/full_size.py [--config sd-1.5] [--backends litert-cpu:float32,torch:float32,torch:bfloat16]
           [--runs 5] [--threads N] [--cache DIR] [--json FILE]

Protocol: random weights, 64x64 latents, 77 text tokens. Per backend each network has a process of its own, both loaded
before anything is timed; then they run in turns, one unmeasured round and `--runs` measured ones: median with minimum
and maximum. The ratio is of the medians. Peak memory is of the process that runs the network, without the export
(which has a process of its own too). Multiply-adds and parameters are counted on shapes, batch 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pocketfusion.artefact import write_json
from pocketfusion.runtime.memory import peak_rss
from pocketfusion.runtime.networks import available_cores
from pocketfusion.runtime.output import cpu_name

BATCH = 2
TOKENS = 77
NETWORKS = ("base", "snapfusion")


def child(settings: dict[str, Any]) -> None:
    """Exports or loads one network; once loaded, runs it for every line on standard input and prints ms and memory."""
    from pocketfusion.cli.shared import quiet_libraries

    quiet_libraries()
    from pocketfusion.latency.profiling import whole_job
    from pocketfusion.latency.target import load_target
    from pocketfusion.latency.timing_backends import make_backend
    from pocketfusion.models.elastic.architecture import Architecture
    from pocketfusion.models.elastic.presets import snapfusion

    target = load_target(settings["config"])
    stock = settings["network"] == "base"
    architecture = Architecture.stock(target.config) if stock else snapfusion(target.config)
    backend = make_backend(settings["backend"], settings["weights"], settings["threads"], Path(settings["cache"]))
    job = whole_job(target, architecture, BATCH)
    if settings["only_export"]:
        backend.prepare(job)
        return
    start = time.perf_counter()
    run = backend.load(job)
    print(json.dumps({"load_seconds": time.perf_counter() - start}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(json.dumps({"ms": 1000 * (time.perf_counter() - start), "peak_rss": peak_rss()}), flush=True)


def _command(settings: dict[str, Any], network: str, only_export: bool) -> list[str]:
    argument = json.dumps({**settings, "network": network, "only_export": only_export})
    return [sys.executable, __file__, "--child", argument]


def compare(settings: dict[str, Any], runs: int) -> dict[str, dict[str, Any]]:
    """Times the networks in turns; by network: ms (median, min, max), load time in seconds, peak memory in bytes."""
    for network in NETWORKS:
        subprocess.run(_command(settings, network, only_export=True), check=True)
    children = {}
    for network in NETWORKS:
        command = _command(settings, network, only_export=False)
        children[network] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        answers = {network: json.loads(process.stdout.readline()) for network, process in children.items()}
        ms: dict[str, list[float]] = {network: [] for network in NETWORKS}
        for number in range(1 + runs):
            for network, process in children.items():
                process.stdin.write("\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                answers[network] |= answer
                if number:
                    ms[network].append(answer["ms"])
    finally:
        for process in children.values():
            process.stdin.close()
            process.wait()
    return {
        network: {
            "ms": {"median": statistics.median(times), "min": min(times), "max": max(times), "runs": runs},
            "load_seconds": answers[network]["load_seconds"],
            "peak_rss": answers[network]["peak_rss"],
        }
        for network, times in ms.items()
    }


def costs(name: str) -> dict[str, dict[str, int]]:
    """Parameters and multiply-adds (batch 1) by network."""
    from pocketfusion.mobile.pipeline_specs import unet_cost
    from pocketfusion.models.elastic.architecture import Architecture
    from pocketfusion.models.elastic.presets import snapfusion
    from pocketfusion.models.sd_configs import CONFIGS

    config = CONFIGS[name]["unet"] | {"mid_block_type": "UNetMidBlock2DCrossAttn"}
    found = {"base": Architecture.stock(config), "snapfusion": snapfusion(config)}
    return {network: unet_cost(config, one, TOKENS)._asdict() for network, one in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="sd-1.5", choices=("sd-1.5", "sd-2.1"))
    parser.add_argument("--backends", default="litert-cpu:float32,torch:float32,torch:bfloat16")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--cache", type=Path, help="keep the exported networks (3 GB each) here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return

    counted = costs(args.config)
    print(f"{args.config}, batch {BATCH}, {args.threads} threads, {cpu_name()}; median (min to max) of {args.runs}")
    for network, cost in counted.items():
        print(f"  {network:<12}{cost['parameters'] / 1e6:>9.1f} M parameters{cost['multiply_adds'] / 1e9:>9.1f} GMAC")
    results = {}
    with tempfile.TemporaryDirectory(prefix="pocketfusion-full-size-") as temporary:
        cache = args.cache or Path(temporary)
        cache.mkdir(parents=True, exist_ok=True)
        for text in args.backends.split(","):
            backend, _, weights = text.partition(":")
            settings = {"config": args.config, "backend": backend, "weights": weights, "threads": args.threads}
            results[text] = compare({**settings, "cache": str(cache)}, args.runs)
            for network, row in results[text].items():
                ms = row["ms"]
                print(
                    f"  {text:<20}{network:<12}{ms['median']:>9,.0f} ms  ({ms['min']:,.0f} to {ms['max']:,.0f})"
                    f"{row['load_seconds']:>8.1f} s load{row['peak_rss'] / 2**30:>7.1f} GiB peak"
                )
            ratio = results[text]["base"]["ms"]["median"] / results[text]["snapfusion"]["ms"]["median"]
            print(f"  {text:<20}base / snapfusion {ratio:.2f}", flush=True)
    if args.json:
        about = {"config": args.config, "batch": BATCH, "threads": args.threads, "cpu": cpu_name(), "runs": args.runs}
        write_json(args.json, {**about, "costs": counted, "results": results})


if __name__ == "__main__":
    main()
