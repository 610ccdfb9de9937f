"""What LiteRT's `benchmark_model` prints.

The tool (https://ai.google.dev/edge/litert/next/benchmark) prints statistics of warm-up and timed runs, in
microseconds (`count=50 first=… curr=… min=… max=… avg=… std=… p5=… median=… p95=…`; older ones end at `std`), then
`Inference timings in us: Init: …, First inference: …, Warmup (avg): …, Inference (avg): …`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pocketfusion.errors import PocketfusionError


def statistics(path: Path) -> dict[str, Any]:
    """median, min and max of the timed runs of a log, in milliseconds, and `runs`, their number; the average stands in
    for the median where the tool prints none.

    Raises PocketfusionError if there is no log, or the tool did not finish.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise PocketfusionError(f"{path} is missing: run the pack's run.sh again") from None
    before, found, _ = text.partition("Inference timings in us:")
    lines = re.findall(r"\bcount=\d.*", before)
    number = r"(\w+)=([\d.]+(?:e[+-]?\d+)?)"
    values = {key: float(value) for key, value in re.findall(number, lines[-1])} if lines else {}
    middle = values.get("median", values.get("avg", values.get("curr")))
    if not found or middle is None:
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it is empty")
        raise PocketfusionError(
            f"{path} holds no result of benchmark_model (its last line: {last[:120]!r}): run the pack's run.sh again"
        )
    low, high = values.get("min", middle), values.get("max", middle)
    return {
        "median": round(middle / 1000, 4),
        "min": round(low / 1000, 4),
        "max": round(high / 1000, 4),
        "runs": int(values["count"]),
    }


def partitions(path: Path) -> tuple[int, int, int] | None:
    """Nodes that a delegate took, nodes in all, and partitions, of the delegate that took most; None if the log names
    no delegate."""
    text = path.read_text(encoding="utf-8", errors="replace")
    line = r"Replacing (\d+) out of (\d+) node\(s\) with delegate.*?yielding (\d+) partitions"
    found = [(int(taken), int(nodes), int(parts)) for taken, nodes, parts in re.findall(line, text)]
    return max(found, default=None)
