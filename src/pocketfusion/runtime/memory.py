"""Memory of this process: what it holds now and held at most, and how to give freed memory back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MACHINE = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Memory:
    """Resident bytes: `anon` is the process's own (heap, and temporary files in memory), `file` pages of files.

    Only `anon` must stay in memory: the system can drop clean pages of files at any time and read them again.
    """

    anon: int
    file: int

    @property
    def total(self) -> int:
        """The resident set."""
        return self.anon + self.file


def memory() -> Memory | None:
    """What this process holds now; None on systems without /proc."""
    values = _status()
    if not values:
        return None
    return Memory(values["RssAnon"] + values.get("RssShmem", 0), values["RssFile"])


def peak_rss() -> int | None:
    """Peak resident set of this process in bytes; None on systems that do not tell (Windows)."""
    values = _status()
    if values:  # getrusage() would also count what the parent had at fork
        return values["VmHWM"]
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forget_peak() -> None:
    """Linux begins to count `peak_rss` anew from what is held now; elsewhere it stays."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available_memory() -> float:
    """Bytes that can be used without swapping, on the machine and in this process's control group; infinity where
    neither is told."""
    found = float("inf")
    with suppress(OSError, ValueError):
        for line in _MACHINE.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = 1024.0 * int(line.split()[1])
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = [
            line.split()[1] for line in (_GROUP / "memory.stat").read_text().splitlines() if "inactive_file" in line
        ]
        found = min(found, float(limit - used + sum(map(int, cached))))
    return found


def release() -> None:
    """Gives freed heap memory back to the system, where the C library can.

    glibc keeps most of what a network frees: 57 of 83 MB after a UNet of 137 M int8 weights, 520 of 656 MB with
    float16 weights; after `malloc_trim` nothing stays (docs/memory.md).
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and returns memory by itself
        if trim is not None:
            trim(0)


def release_garbage() -> None:
    """`release`, after a collection of what is left in circles: a conversion leaves gigabytes there that nothing asks
    Python's collector for."""
    gc.collect()
    release()


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes; empty where there is none."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return {}
    return {
        key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines) if "kB" in rest
    }
