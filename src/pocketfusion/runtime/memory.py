"""Peak memory of this process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss() -> int | None:
    """Peak resident set of this process in bytes; None on systems that do not tell (Windows)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage() would also count what the parent had at fork
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
