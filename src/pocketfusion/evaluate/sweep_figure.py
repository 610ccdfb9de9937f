"""The picture of a sweep: a line a system, Fréchet distance over CLIP score, each point's guidance beside it."""

from __future__ import annotations

from pathlib import Path

from pocketfusion.evaluate.sweep import Sweep

_STYLES = (
    ("#1f5fbf", "o"),
    ("#c8501e", "D"),
    ("#2a9d3f", "s"),
    ("#7a4fb5", "^"),
    ("#8c8c8c", "v"),
    ("#b58a1e", "P"),
    ("#1e9aa8", "X"),
)


def plot_curves(result: Sweep, path: Path) -> None:
    """Lower and further right is better; faint bars are the CLIP score's 95 % intervals (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    for number, curve in enumerate(result.curves):
        colour, marker = _STYLES[number % len(_STYLES)]
        scores = [point.clip_score for point in curve.points]
        x, y = [score.value for score in scores], [point.frechet for point in curve.points]
        axis.hlines(y, [s.low for s in scores], [s.high for s in scores], color=colour, alpha=0.25, lw=1.5)
        axis.plot(x, y, color=colour, marker=marker, ms=6, lw=1.6, label=curve.label)
        for point, left, top in zip(curve.points, x, y, strict=True):
            axis.annotate(
                f"{point.guidance_scale:g}", (left, top), xytext=(5, 5), textcoords="offset points",
                fontsize=8, color=colour,
            )  # fmt: skip
    count = sum(len(ids) for ids in result.protocol["sets"].values())
    axis.set_xlabel("CLIP score (higher is better)")
    axis.set_ylabel("Fréchet distance, judge features (lower is better)")
    steps = result.protocol["num_inference_steps"]
    axis.set_title(f"{count} captions, {steps} steps; numbers are guidance scales", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Software": None})
