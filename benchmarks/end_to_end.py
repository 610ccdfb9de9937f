"""`generate` end to end, several bundles in turns: prompt to picture on LiteRT's CPU, and the ratio to the first.

Usage: python benchmarks/end_to_end.py BUNDLE[@STEPS] BUNDLE[@STEPS] … [--runs 20] [--threads N] [--json FILE]

Protocol: every bundle is loaded once and draws one unmeasured picture; then rounds in which each draws one picture of
the same prompt and seed at its own guidance; median with minimum and maximum of `--runs`. Loading is not in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pocketfusion
from pocketfusion.artefact import write_json
from pocketfusion.runtime.output import environment, spread

PROMPT = "a red apple, noto style"


def main() -> None:
    """Parses the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE[@STEPS]")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    systems = []
    for name in given.bundles:
        path, _, steps = name.partition("@")
        systems.append((name, pocketfusion.load(path, num_threads=given.threads), int(steps) if steps else None))
    results: dict[str, list[Any]] = {name: [] for name, _, _ in systems}
    for run in range(given.runs + 1):
        for name, pipeline, steps in systems:
            result = pipeline.generate(PROMPT, seed=0, num_inference_steps=steps)
            if run:
                results[name].append(result)
    rows: list[dict[str, Any]] = []
    for name, pipeline, _ in systems:
        timings = [result.timings for result in results[name]]
        rows.append(
            {
                "bundle": name,
                "steps": results[name][0].num_inference_steps,
                "guidance_scale": results[name][0].guidance_scale,
                "guidance": pipeline.manifest.guidance,
                "total": spread([t.total for t in timings]),
                "text": spread([t.text for t in timings]),
                "step": spread([s for t in timings for s in t.steps]),
                "decode": spread([s for t in timings for s in t.decode]),
            }
        )
        rows[-1]["ratio"] = rows[0]["total"]["median"] / rows[-1]["total"]["median"]
    about = environment(systems[0][1])
    print(f"{about['cpu']}, {about['runtime']}, {about['threads']} threads; median (min to max) of {given.runs}")
    for row in rows:
        total = {key: 1000 * value for key, value in row["total"].items()}
        parts = {key: 1000 * row[key]["median"] for key in ("text", "step", "decode")}
        print(
            f"{row['bundle']}: {total['median']:.1f} ms ({total['min']:.1f} to {total['max']:.1f}), "
            f"{row['ratio']:.1f}x; {row['steps']} steps of {parts['step']:.2f} ms ({row['guidance']} "
            f"{row['guidance_scale']:g}), text {parts['text']:.1f}, decode {parts['decode']:.1f} ms"
        )
    if given.json:
        write_json(given.json, {"systems": rows, "runs": given.runs, **about})


if __name__ == "__main__":
    main()
