"""Pictures of an evaluation: scores as dots, the fixed prompts, and the pairs nearest to training pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pocketfusion.evaluate.copying import Pair
from pocketfusion.evaluate.prompts import COLUMNS, Prompt
from pocketfusion.evaluate.report import KINDS, Report
from pocketfusion.runtime.sheet import contact_sheet

_STYLES = (("real", "#2a9d3f", "o"), ("generated", "#1f5fbf", "D"), ("shuffled", "#999999", "x"))
_MEASURES = (
    ("clip_score", "CLIP score", 1.0),
    ("top1", "top-1 retrieval, %", 100.0),
    ("top5", "top-5 retrieval, %", 100.0),
)


def plot_scores(report: Report, path: Path) -> None:
    """A panel a measure, a line a set: generated between real and shuffled captions, with 95 % intervals (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.6 + 0.5 * len(report.sets)), layout="constrained")
    axes = figure.subplots(1, len(_MEASURES), sharey=True)
    for axis, (measure, title, scale) in zip(axes, _MEASURES, strict=True):
        for offset, (kind, colour, marker) in zip((-0.2, 0.0, 0.2), _STYLES, strict=True):
            for row, result in enumerate(report.sets):
                y = row + offset
                estimate = getattr(getattr(result, kind), measure)
                label = KINDS[kind] if axis is axes[0] and row == 0 else None
                axis.plot([scale * estimate.low, scale * estimate.high], [y, y], color=colour, lw=1.5)
                axis.plot(scale * estimate.value, y, marker, color=colour, ms=6, label=label, ls="none")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", alpha=0.3)
        axis.set_yticks(range(len(report.sets)), [f"{result.name} (n={result.count})" for result in report.sets])
    axes[0].invert_yaxis()
    figure.legend(fontsize=9, loc="outside lower center", ncols=len(_STYLES))
    figure.savefig(path, dpi=110, metadata={"Software": None})


def prompt_sheet(images: np.ndarray, prompts: Sequence[Prompt], path: Path) -> None:
    """The contact sheet of the fixed prompts, each with its set's name (PNG)."""
    captions = [f"[{prompt.set}] {prompt.prompt}" for prompt in prompts]
    contact_sheet([Image.fromarray(image) for image in images], captions, columns=COLUMNS).save(path)


def nearest_pairs(pairs: Sequence[Pair], path: Path) -> None:
    """Each generated picture above its nearest training picture, their captions and RMS below (PNG)."""
    pictures = [Image.fromarray(pair.generated) for pair in pairs] + [Image.fromarray(pair.training) for pair in pairs]
    texts = [f"drawn: {pair.prompt}" for pair in pairs]
    texts += [f"training (RMS {pair.rms:.1f}): {pair.caption}" for pair in pairs]
    contact_sheet(pictures, texts, columns=len(pairs)).save(path)
