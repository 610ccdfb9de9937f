"""pocketfusion: small, few-step text-to-image diffusion for phones."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pocketfusion.runtime.pipeline import Pipeline
    from pocketfusion.runtime.residency import Mode

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    bundle: str | Path | None = None,
    *,
    num_threads: int | None = None,
    mode: Mode | None = None,
    memory_budget: float | None = None,
    cache: str | Path | None = None,
) -> Pipeline:
    """Loads the bundle at `bundle` (default: the embedded one) on `num_threads` threads (default: all cores).

    `mode` (`resident`, `pipelined` or `sequential`) says which networks are in memory when; `memory_budget`, in MB for
    the whole process, chooses the fastest one that fits. `cache` is a folder for packed weights, which
    the next start need not pack.
    Raises PocketfusionError if the bundle is missing, altered, damaged or from a newer version, or does not fit.

    Examples:
        >>> pocketfusion.load().generate("a red apple").images[0].save("apple.png")
    """
    from pocketfusion.runtime.pipeline import Pipeline

    return Pipeline.load(bundle, num_threads, mode=mode, memory_budget=memory_budget, cache=cache)
