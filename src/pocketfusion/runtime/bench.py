"""Measures bundles in turns: each loaded in a process of its own, then rounds in which each draws one picture.

In turns, because a machine's speed drifts by more than two bundles may differ: all meet the same drift, and the ratio
of the medians stays. Apart, because peak memory belongs to a process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.runtime.manifest import Bundle
from pocketfusion.runtime.output import environment, spread
from pocketfusion.runtime.pipeline import Pipeline
from pocketfusion.runtime.residency import Mode, check_mode
from pocketfusion.runtime.runtimes import choose_runtime

PROMPT = "a red apple, noto style"


@dataclass(frozen=True)
class Settings:
    """What is measured: `runs` rounds after an unmeasured one, each one picture of `prompt` at seed 0."""

    runs: int = 10
    threads: int | None = None
    steps: int | None = None
    mode: Mode = "resident"
    prompt: str = PROMPT
    runtime: str | None = None  #: for all, their own where None


def bench(
    bundles: Sequence[Path], settings: Settings, on_picture: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """One row per bundle: times in seconds, `peak_rss` in bytes, `ratio` of the first bundle's total to its own, and
    what they depend on. `on_picture` is called after each of the (1 + runs) pictures of each bundle.

    `open` (reading and verifying the files) and `compile` (building and packing what the mode keeps) are measured
    once, at the start of the process; `text`, `step`, `decode`, `rest` (loading and freeing while drawing) and `total`
    over all rounds, the steps of all rounds together.
    Raises PocketfusionError for settings out of range, and for whatever is wrong with a bundle.
    """
    if settings.runs < 1:
        raise PocketfusionError(f"the number of runs is {settings.runs}: choose 1 or more")
    check_mode(settings.mode)
    for path in bundles:
        # told before any work; the child verifies
        choose_runtime(path, Bundle.open(path, verify=False, drawable=True).manifest, settings.runtime)
    with ExitStack() as stack:
        children = [stack.enter_context(_Child(path, settings)) for path in bundles]
        started = [child.answer() for child in children]
        rounds: list[list[dict[str, Any]]] = [[] for _ in children]
        for number in range(1 + settings.runs):
            for child, results in zip(children, rounds, strict=True):
                result = child.draw()
                on_picture()
                if number:
                    results.append(result)
    rows = [_row(path, start, results) for path, start, results in zip(bundles, started, rounds, strict=True)]
    for row in rows:
        row["ratio"] = rows[0]["seconds"]["total"]["median"] / row["seconds"]["total"]["median"]
    return rows


def _row(path: Path, start: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    rests = [r["total"] - r["text"] - sum(r["steps"]) - sum(r["decode"]) for r in results]
    return {
        "path": str(path),
        **start["about"],
        "seconds": {
            "open": start["open"],
            "compile": start["compile"],
            "text": spread([r["text"] for r in results]),
            "step": spread([step for r in results for step in r["steps"]]),
            "decode": spread([one for r in results for one in r["decode"]]),
            "rest": spread(rests),
            "total": spread([r["total"] for r in results]),
        },
        "peak_rss": results[-1]["peak_rss"],
    }


class _Child:
    """A process that loads a bundle, then draws a picture for every line that it is sent."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        command = [sys.executable, "-m", __name__, json.dumps({"path": str(path), **asdict(settings)})]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    def draw(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: answer() tells how
        return self.answer()

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PocketfusionError(
                f"the process that ran {self.path} ended with code {self._process.wait()}: see if memory is short"
            )
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise PocketfusionError(result["error"])
        return result


def _child(
    path: str, runs: int, threads: int | None, steps: int | None, mode: Mode, prompt: str, runtime: str | None
) -> None:
    """Answers on standard output, one JSON object a line: the start, then a picture's times for each line read."""
    began = time.perf_counter()
    bundle = Bundle.open(path, drawable=True)
    opened = time.perf_counter()
    pipeline = Pipeline(bundle, threads, mode=mode, runtime=runtime)
    compiled = time.perf_counter()
    defaults = pipeline.manifest.defaults
    about = {
        **environment(pipeline),
        "mode": pipeline.mode,
        "num_inference_steps": defaults.num_inference_steps if steps is None else steps,
        "guidance": pipeline.manifest.guidance,
        "guidance_scale": defaults.guidance_scale,
        "unet_batch": pipeline.manifest.networks.unet.batch,
        "image_size": [pipeline.manifest.image.width, pipeline.manifest.image.height],
    }
    print(json.dumps({"open": opened - began, "compile": compiled - opened, "about": about}), flush=True)
    for _ in sys.stdin:
        result = pipeline.generate(prompt, seed=0, num_inference_steps=steps)
        print(json.dumps({**asdict(result.timings), "peak_rss": result.peak_rss}), flush=True)


if __name__ == "__main__":
    try:
        _child(**json.loads(sys.argv[1]))
    except PocketfusionError as error:
        print(json.dumps({"error": str(error)}), flush=True)
