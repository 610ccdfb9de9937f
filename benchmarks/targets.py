"""The targets of docs/speed.md in one run: pictures of SD-1.5 in PyTorch and of what is made of it, in turns; the two
forms of guidance; and the embedded model's base at 50 steps against the final one.

`python benchmarks/speed.py --full DIR --only targets` runs it. A round is one call of every network; what a picture
takes is their sum, as often as it calls them. On one thread seconds are the processor's, which other work on the
machine does not add to; on more they are the clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pocketfusion.quiet import quiet

Runner = Callable[[], object]
#: Calls of the UNet a picture: 8 guided steps in two calls each, 8 and 4 of one, as guidance that is distilled has it.
PICTURES = {"8 guided steps": 16, "8 steps of one call": 8, "4 steps of one call": 4}
#: Times faster than SD-1.5, by picture: the goals without and with AMX.
GOALS = ((20, 80), (43, 150), (80, 250))
#: The base's 50 steps ÷ the final model's.
EMBEDDED_GOAL = 25


def in_turns(runners: Mapping[str, Runner], runs: int, threads: int) -> dict[str, float]:
    """Median seconds of each runner, of `runs` rounds after an unmeasured one."""
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(1 + runs):
        for name, run in runners.items():
            start = clock()
            run()
            if number:
                seconds[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def litert(file: Path, threads: int) -> Runner:
    """A call of the network in `file` on noise."""
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        interpreter = Interpreter(str(file), num_threads=threads)
        interpreter.allocate_tensors()
    noise = np.random.default_rng(0)
    for details in interpreter.get_signature_runner().get_input_details().values():
        values = noise.standard_normal(details["shape"]).astype(details["dtype"])
        interpreter.set_tensor(details["index"], np.abs(values))  # token numbers are not negative
    return interpreter.invoke


def sd15(threads: int) -> dict[str, Runner]:
    """SD-1.5's text encoder, a guided call of its UNet (batch 2) and its decoder: PyTorch eager, float32."""
    from decoder_latency import decoder_job
    from pocketfusion.latency.profiling import whole_job
    from pocketfusion.latency.target import load_target
    from pocketfusion.latency.timing_backends import make_backend

    target = load_target("sd-1.5")
    backend = make_backend("torch", "float32", threads, Path())
    return {
        "SD-1.5, text": backend.load(target.networks()[0]["text_encoder"]),
        "SD-1.5, guided call": backend.load(whole_job(target, target.architecture, 2)),
        "SD-1.5, decoder": backend.load(decoder_job("sd-1.5")),
    }


def pictures(files: Mapping[str, Path], runs: int, threads: int) -> list[str]:
    """Lines: seconds of every network, and of a picture, with its goal."""
    runners = sd15(threads) | {f"ours, {name}": litert(file, threads) for name, file in files.items()}
    seconds = in_turns(runners, runs, threads)
    lines = ["| network | seconds |", "|---|---|", *(f"| {name} | {one:.2f} |" for name, one in seconds.items())]
    base = 2 * seconds["SD-1.5, text"] + 50 * seconds["SD-1.5, guided call"] + seconds["SD-1.5, decoder"]
    lines += ["", "| picture | seconds | times faster | goal without AMX | with it |", "|---|---|---|---|---|"]
    lines.append(f"| SD-1.5, PyTorch float32, 50 guided steps (a call × 50) | {base:.1f} | 1 | | |")
    for (name, calls), goals in zip(PICTURES.items(), GOALS, strict=True):
        ours = seconds["ours, text"] + calls * seconds["ours, UNet"] + seconds["ours, decoder"]
        lines.append(_row(f"ours, {name}", ours, base / ours, *goals))
    return lines


def _row(name: str, seconds: float, times: float, *goals: float) -> str:
    told = (f"{goal}: {'met' if times >= goal else 'missed'}" for goal in goals)
    return f"| {' | '.join((name, f'{seconds:.2f}', f'{times:.1f}', *told))} |"


def calls(pairs: Mapping[str, tuple[Path, Path]], runs: int, threads: int) -> list[str]:
    """Lines: a guided step of UNets in one call of batch 2, and in two calls of batch 1."""
    runners: dict[str, Runner] = {}
    for name, (two, one) in pairs.items():
        single = litert(one, threads)
        runners[f"{name} one"] = litert(two, threads)
        runners[f"{name} two"] = lambda single=single: (single(), single())  # type: ignore[misc]
    seconds = in_turns(runners, runs, threads)
    lines = ["| guided step of | one call of batch 2, ms | two of batch 1, ms | two ÷ one |", "|---|---|---|---|"]
    for name in pairs:
        one, two = 1000 * seconds[f"{name} one"], 1000 * seconds[f"{name} two"]
        lines.append(f"| {name} | {one:.1f} | {two:.1f} | {two / one:.2f} |")
    return lines


def embedded(models: Path, scratch: Path, runs: int, threads: int) -> list[str]:
    """Lines: pictures of the embedded model's base at 50 steps and of the final model, `--for desktop`, in turns."""
    import pocketfusion
    from pocketfusion.mobile.export import export

    bundles = {}
    for name in ("base", "final"):
        bundles[name] = scratch / name
        if not bundles[name].exists():
            weights = {"text_encoder": "float16", "unet": "int8-dynamic", "decoder": "int8-dynamic"}
            export(models / name, bundles[name], weights=weights)
    pipelines = {name: pocketfusion.load(path, num_threads=threads) for name, path in bundles.items()}
    base, final = pipelines["base"], pipelines["final"]
    steps = final.manifest.defaults.num_inference_steps
    plans: dict[str, Runner] = {
        "base, 50 guided steps": lambda: base.generate("a red apple", seed=0, num_inference_steps=50),
        f"final, {steps} guided steps": lambda: final.generate("a red apple", seed=0),
    }
    seconds = in_turns(plans, runs, threads)
    (first, slow), (last, quick) = seconds.items()
    return [
        f"| embedded model, {base.manifest.image.width} px | seconds | times faster | goal |",
        "|---|---|---|---|",
        *(f"| {first} | {slow:.2f} | 1 | |", _row(last, quick, slow / quick, EMBEDDED_GOAL)),
    ]
