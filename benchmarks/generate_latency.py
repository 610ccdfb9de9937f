"""Time and memory of `pocketfusion generate`: load apart from run, and start-up to first step in a fresh process.

Usage: python benchmarks/generate_latency.py [--bundle PATH] [--runs 10] [--steps N] [--threads N] [--json FILE]

Protocol: per run one picture, guided, with the bundle's defaults unless given; one unmeasured warm-up, then the median
of `--runs` with minimum and maximum. Start-up is the wall time from starting a Python process to the end of its first
step, files in the page cache; `--runs` processes, one unmeasured before them. Peak memory is that of such a process
after a whole picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pocketfusion
from pocketfusion.artefact import write_json
from pocketfusion.runtime.output import environment, spread

PROMPT = "a red apple, noto style"

_CHILD = """
import json, sys, time
import pocketfusion
bundle, threads, steps = json.loads(sys.argv[1])
first = []
pipeline = pocketfusion.load(bundle, num_threads=threads)
result = pipeline.generate(sys.argv[2], seed=0, num_inference_steps=steps,
                           callback=lambda *step: first.append(time.time()) if not first else None)
print(json.dumps({"first": first[0], "load": pipeline.load_seconds, "peak_rss": result.peak_rss}))
"""


def fresh_processes(bundle: str | None, threads: int | None, steps: int | None, runs: int) -> dict[str, Any]:
    """Start-up to first step and load (s), peak memory (bytes) of `runs` fresh processes after one unmeasured."""
    rows = []
    for _ in range(runs + 1):
        start = time.time()
        command = [sys.executable, "-c", _CHILD, json.dumps([bundle, threads, steps]), PROMPT]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append({"startup": row["first"] - start, "load": row["load"], "peak_rss": row["peak_rss"]})
    return {key: spread([row[key] for row in rows[1:]]) for key in ("startup", "load", "peak_rss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="default: the embedded one")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    pipeline = pocketfusion.load(args.bundle, num_threads=args.threads)
    pipeline.generate(PROMPT, seed=0, num_inference_steps=args.steps)
    results = [pipeline.generate(PROMPT, seed=0, num_inference_steps=args.steps) for _ in range(args.runs)]
    seconds = {
        "total": spread([r.timings.total for r in results]),
        "step": spread([t for r in results for t in r.timings.steps]),
        "decode": spread([t for r in results for t in r.timings.decode]),
        "text": spread([r.timings.text for r in results]),
    }
    fresh = fresh_processes(args.bundle, args.threads, args.steps, args.runs)
    peak_rss = fresh.pop("peak_rss")
    seconds |= {"load": fresh["load"], "startup_to_first_step": fresh["startup"]}

    about = environment(pipeline)
    steps, scale = results[0].num_inference_steps, results[0].guidance_scale
    width, height = results[0].images[0].size
    print(
        f"{about['bundle']['name']}, {width}×{height}, {steps} steps, guidance {scale:g}, {about['threads']} threads"
    )
    print(f"{about['cpu']}, {about['runtime']}; median (min to max) of {args.runs}")
    for name, row in seconds.items():
        print(f"  {name:<22}{1000 * row['median']:>9.1f} ms  ({1000 * row['min']:.1f} to {1000 * row['max']:.1f})")
    print(f"  {'peak memory':<22}{peak_rss['median'] / 2**20:>9.0f} MiB")
    if args.json:
        settings = {"num_inference_steps": steps, "guidance_scale": scale, "image_size": [width, height]}
        write_json(args.json, {"seconds": seconds, "peak_rss": peak_rss, "runs": args.runs, **settings, **about})


if __name__ == "__main__":
    main()
