"""Where a `.tflite` network's time goes, operation by operation, by LiteRT's own profiler.

Usage: python benchmarks/op_profile.py FILE.tflite [FILE …] [--runs 5] [--threads 1]

The profiler is in LiteRT's C library alone (2.3.0), which is called by ctypes: XNNPACK's operations with the kernel
that each took, and what XNNPACK left to LiteRT's own kernels. Inputs are noise, integers are ones.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ai_edge_litert
import numpy as np

from pocketfusion.quiet import quiet
from pocketfusion.runtime.output import cpu_name

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
#: Kinds of events: an operation of LiteRT's own, and one inside a delegate.
_OWN, _DELEGATED = 2, 8
_FLOAT32, _WRITE, _CPU = 1, 1, 1


class _Event(ctypes.Structure):
    """LiteRT 2.3.0's `ProfiledEventData`."""

    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("start", ctypes.c_uint64),
        ("microseconds", ctypes.c_uint64),
        ("memory", ctypes.c_int64 * 6),
        ("metadata", ctypes.c_uint64 * 2),
        ("source", ctypes.c_int),
    )


@dataclass(frozen=True)
class Profile:
    """A call's median seconds, wall and of the processor, and each kind of operation's share of the mean call."""

    wall: float
    processor: float
    operations: dict[str, tuple[float, int]]  #: milliseconds and count in one call

    def rows(self, least: float = 0.005) -> list[str]:
        """Lines of a Markdown table: operation, count, milliseconds, share; what is under `least` as one."""
        total = sum(ms for ms, _ in self.operations.values())
        shown = {name: one for name, one in self.operations.items() if one[0] >= least * total}
        rest = [one for name, one in self.operations.items() if name not in shown]
        lines = ["| operation | count | ms | share |", "|---|---|---|---|"]
        for name, (ms, count) in sorted(shown.items(), key=lambda item: -item[1][0]):
            lines.append(f"| {name} | {count} | {ms:.1f} | {ms / total:.0%} |")
        if rest:
            ms, count = sum(one[0] for one in rest), sum(one[1] for one in rest)
            lines.append(f"| others | {count} | {ms:.1f} | {ms / total:.0%} |")
        return lines


class _Library:
    """LiteRT's C functions, by name without their `LiteRt`; a status that is not 0 raises RuntimeError."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(Path(ai_edge_litert.__file__).parent / "libLiteRt.so"))

    def __call__(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, f"LiteRt{name}")(*arguments):
            raise RuntimeError(f"LiteRt{name} answers {status}: this LiteRT is not the 2.3.0 that is profiled here")

    def made(self, name: str, *arguments: Any, kind: Any = _POINTER) -> Any:
        """What the function writes at its last argument."""
        value = kind()
        self(name, *arguments, ctypes.byref(value))
        return value


def profile(file: Path, runs: int = 5, threads: int = 1) -> Profile:
    """Loads `file` on LiteRT's CPU path, warms it up once, and profiles `runs` calls."""
    with quiet():
        return _profile(_Library(), file, runs, threads)


def _profile(litert: _Library, file: Path, runs: int, threads: int) -> Profile:
    environment = litert.made("CreateEnvironment", 0, None)
    model = litert.made("CreateModelFromFile", environment, str(file).encode())
    options = litert.made("CreateOptions")
    litert("SetOptionsHardwareAccelerators", options, _CPU)
    texts = [ctypes.create_string_buffer(text) for text in (b"enable_profiling = true", b"num_threads = %d" % threads)]
    keep = ctypes.CFUNCTYPE(None, _POINTER)(lambda text: None)  # Python frees the texts
    for name, text in zip((b"runtime_options_string", b"xnnpack"), texts, strict=True):
        address = ctypes.cast(text, _POINTER)
        litert("AddOpaqueOptions", options, litert.made("CreateOpaqueOptions", name, address, keep))
    compiled = litert.made("CreateCompiledModel", environment, model, options)
    signature = litert.made("GetModelSignature", model, _SIZE(0))
    arguments: list[Any] = []
    for side in ("Input", "Output"):
        count = litert.made(f"GetNumSignature{side}s", signature, kind=_SIZE)
        buffers = (_POINTER * count.value)()
        for i in range(count.value):
            tensor = litert.made(f"GetSignature{side}TensorByIndex", signature, _SIZE(i))
            needs = litert.made(f"GetCompiledModel{side}BufferRequirements", compiled, _SIZE(0), _SIZE(i))
            kind = ctypes.create_string_buffer(256)  # LiteRtRankedTensorType: the element's type comes first
            litert("GetRankedTensorType", tensor, kind)
            buffer = litert.made("CreateManagedTensorBufferFromRequirements", environment, kind, needs)
            size = litert.made("GetTensorBufferPackedSize", buffer, kind=_SIZE).value
            noise = np.random.default_rng(0).standard_normal(size // 4).astype(np.float32)
            integers = ctypes.cast(kind, ctypes.POINTER(ctypes.c_int))[0] != _FLOAT32
            values = np.ones(size // 4, np.int32) if integers else noise
            address = _POINTER()
            litert("LockTensorBuffer", buffer, ctypes.byref(address), _WRITE)
            ctypes.memmove(address, values.ctypes.data, values.nbytes)
            litert("UnlockTensorBuffer", buffer)
            buffers[i] = buffer.value
        arguments += [count, buffers]
    profiler = litert.made("CompiledModelGetProfiler", compiled)
    litert("RunCompiledModel", compiled, _SIZE(0), *arguments)
    litert("StartProfiler", profiler)
    walls, processors = [], []
    for _ in range(runs):
        wall, processor = time.perf_counter(), time.process_time()
        litert("RunCompiledModel", compiled, _SIZE(0), *arguments)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    litert("StopProfiler", profiler)
    number = litert.made("GetNumProfilerEvents", profiler, kind=ctypes.c_int)
    events = (_Event * number.value)()
    litert("GetProfilerEvents", profiler, number, events)
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.kind in (_OWN, _DELEGATED):
            name = event.tag.decode() + (" (LiteRT's own kernel)" if event.kind == _OWN else "")
            totals[name][0] += event.microseconds / 1000 / runs
            totals[name][1] += 1
    litert._library.LiteRtDestroyCompiledModel(compiled)
    found = {name: (ms, round(count / runs)) for name, (ms, count) in totals.items()}
    return Profile(statistics.median(walls), statistics.median(processors), found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.tflite")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(f"{cpu_name()}, LiteRT on {args.threads} threads, the mean of {args.runs} calls after one")
    for file in args.files:
        found = profile(file, args.runs, args.threads)
        print(f"\n{file}: {1000 * found.wall:.1f} ms a call, {1000 * found.processor:.1f} of the processor\n")
        print("\n".join(found.rows()))


if __name__ == "__main__":
    main()
