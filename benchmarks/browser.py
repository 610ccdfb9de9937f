"""Time of a picture in Chromium on WASM against this machine's own LiteRT, in turns in one run.

python benchmarks/browser.py [BUNDLE] [--rounds 15] [--visits 5] [--steps 8] [--threads 2] [--json FILE]

Needs Chromium and web/node_modules (`npm ci` in web/). A bundle (default: the embedded one) is opened with nothing
kept, then at so many visits with all of it in the cache, then drawn with in turns. The browser takes up to four
threads, of those that the machine has; `--threads` are this side's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from pocketfusion.runtime.manifest import embedded_bundle
from pocketfusion.runtime.pipeline import Pipeline

WEB = Path(__file__).parents[1] / "web"
RUN = """import { startVitest } from "vitest/node";
const settings = { include: ["tests/engine/measure.ts"], run: true, watch: false };
const vitest = await startVitest("test", ["measure"], settings);
await vitest.close();
"""


def wait(file: Path, process: subprocess.Popen[bytes]) -> Any:
    """The JSON that appears in `file`."""
    while not file.exists():
        if process.poll() is not None:
            raise SystemExit(f"the browser's side ended with exit code {process.returncode}")
        time.sleep(0.02)
    return json.loads(file.read_text())


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", type=Path, default=embedded_bundle())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--visits", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    native = Pipeline.load(settings.bundle, settings.threads)
    ask = {"seed": 3, "num_inference_steps": settings.steps}
    native.generate("a red apple, noto style", **ask)
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "POCKETFUSION_TURNS": folder,
            "POCKETFUSION_BUNDLE": str(settings.bundle),
            "POCKETFUSION_ROUNDS": str(settings.rounds),
            "POCKETFUSION_VISITS": str(settings.visits),
            "POCKETFUSION_STEPS": str(settings.steps),
        }
        command = ["node", "--input-type=module", "-e", RUN]
        process = subprocess.Popen(command, cwd=WEB, env={**os.environ, **environment}, stdout=subprocess.DEVNULL)
        result = wait(Path(folder) / "begin.json", process)
        browser, own = [], []
        for turn in range(settings.rounds):
            timings = native.generate("a red apple, noto style", **ask).timings
            own.append({"total": 1000 * timings.total, "step": 1000 * statistics.median(timings.steps)})
            (Path(folder) / f"turn-{turn}").touch()
            one = wait(Path(folder) / f"turn-{turn}.json", process)
            browser.append({"total": one["total"], "step": statistics.median(one["steps"]), "heap": one["heap"]})
        process.wait()
    for key in ("total", "step"):
        ours, theirs = ([one[key] for one in runs] for runs in (browser, own))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        result[key] = {"browser": spread(ours), "native": spread(theirs), "ratio": spread(ratios)}
        for side, figures in result[key].items():
            print(f"{key:6} {side:8}" + "".join(f" {name} {value:.4g}" for name, value in figures.items()))
    for key, starts in {"cold": [result["cold"]], **({"warm": result["warm"]} if result["warm"] else {})}.items():
        figures = spread([start["first"] for start in starts])
        print(
            f"{key} start to the first picture, ms: {figures}; of the last one {starts[-1]['load']}, its picture "
            f"{starts[-1]['picture']}"
        )
    last = [result["cold"], *result["warm"]][-1]
    result["heap"] = {"first": last["heaps"][-1], "last": browser[-1]["heap"], "pictures": settings.rounds + 1}
    print(f"heap {result['heap']}, threads {last['threads']}, Chromium {result['browser']}")
    if settings.json:
        settings.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
