"""The pictures of an evaluation: the curves, and a sheet of the same captions by every system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pocketfusion.evaluate.curves import Curves, Point
from pocketfusion.evaluate.metrics import Estimate
from pocketfusion.runtime.sheet import contact_sheet

_STYLES = (
    ("#1f5fbf", "o"),
    ("#c8501e", "D"),
    ("#2a9d3f", "s"),
    ("#7a4fb5", "^"),
    ("#8c8c8c", "v"),
    ("#b58a1e", "P"),
    ("#1e9aa8", "X"),
)


def plot_curves(result: Curves, path: Path) -> None:
    """Lower and further right is better; light bars are 95 % intervals (of KID: its subsets' deviation) (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    for number, curve in enumerate(result.curves):
        colour, marker = _STYLES[number % len(_STYLES)]
        x = np.array([point.clip_score for point in curve.points])  # value, low, high
        y = np.array([_distance(point) for point in curve.points])
        axis.hlines(y[:, 0], x[:, 1], x[:, 2], color=colour, alpha=0.25, lw=1.5)
        axis.vlines(x[:, 0], y[:, 1], y[:, 2], color=colour, alpha=0.25, lw=1.5)
        line = "-" if len(curve.points) > 1 else ""
        axis.plot(x[:, 0], y[:, 0], color=colour, marker=marker, ls=line, ms=6, lw=1.6, label=curve.label)
        for point, left, top in zip(curve.points, x[:, 0], y[:, 0], strict=True):
            axis.annotate(
                f"{point.guidance_scale:g}", (left, top), xytext=(5, 5), textcoords="offset points",
                fontsize=8, color=colour,
            )  # fmt: skip
    name = " ".join(dict.fromkeys(result.protocol["extractor"]["name"].split()))  # a judge's folder may be "judge"
    kid_only = any(point.frechet is None for curve in result.curves for point in curve.points)
    axis.set_xlabel(f"CLIP score (higher is better), {name}")
    axis.set_ylabel(f"{'KID' if kid_only else 'Fréchet distance'} (lower is better), {name}")
    axis.set_title(f"{result.protocol['pictures']} captions; numbers are guidance scales", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _distance(point: Point) -> Estimate:
    """What stands on the y axis: the Fréchet distance, or KID with its subsets' deviation where there is none."""
    value, std = point.kid
    return point.frechet or Estimate(value, value - std, value + std)


def system_sheet(captions: Sequence[str], rows: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """A row a system, named below each picture; its caption stands below the first row (PNG)."""
    pictures = [Image.fromarray(image) for _, images in rows for image in images]
    texts = [f"{name}: {caption}" for name, _ in rows for caption in captions]
    contact_sheet(pictures, texts, columns=len(captions)).save(path)
