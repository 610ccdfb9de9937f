"""The result of `score`: its file's shape, tables, and pictures (scores as dots, the fixed prompts, nearest pairs)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from pocketfusion.evaluate.metrics import Estimate
from pocketfusion.evaluate.prompts import COLUMNS, Prompt
from pocketfusion.evaluate.score.copying import Pair
from pocketfusion.runtime.result import contact_sheet


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NearestStats(_Record):
    """Distances to the nearest training picture over a set (a real training picture's own copy is left out)."""

    rms_median: float  #: of 0 to 255, at 32×32 pixels
    rms_p5: float
    cosine_median: float  #: of judge features
    suspicious: float  #: share nearer than all but 5 % of the real held-out pictures


class Row(_Record):
    """The scores of one kind of picture; None where a measure does not apply or has too few pictures."""

    clip_score: Estimate
    top1: Estimate
    top5: Estimate
    frechet_real: float | None = None  #: to the real pictures of this set
    frechet_train: float | None = None  #: to the training pictures
    nearest: NearestStats | None = None


class SceneScores(_Record):
    """Shares of pictures found right; `layout` and `relation` over the relation scenes alone."""

    background: Estimate
    number: Estimate
    layout: Estimate | None = None
    relation: Estimate | None = None


class SetResult(_Record):
    """One set: generated pictures between the ceiling (real) and the floor (real pictures, shuffled captions)."""

    name: str
    count: int
    pool: int
    chance_top1: float
    chance_top5: float
    real: Row
    generated: Row
    shuffled: Row
    share: dict[str, float]  #: generated ÷ real, of clip_score, top1, top5
    scenes: dict[str, SceneScores] | None = None  #: real, generated, shuffled
    frechet_absent: str | None = None  #: why there is no Fréchet distance


class Report(_Record):
    """A whole evaluation: enough to repeat it and to compare it."""

    format: str = "pocketfusion-evaluation"
    version: int = 1
    protocol: dict[str, Any]
    sets: list[SetResult]
    notes: list[str] = []


HEADER = (
    "set", "pictures", "CLIP score", "top-1 %", "top-5 %", "Fréchet to real", "Fréchet to train", "nearest RMS",
    "nearest cosine", "suspicious %",
)  # fmt: skip
_SCENE_HEADER = ("pictures", "background %", "number %", "layout %", "relation %")
KINDS = {"real": "real", "generated": "generated", "shuffled": "shuffled captions"}
_STYLES = (("real", "#2a9d3f", "o"), ("generated", "#1f5fbf", "D"), ("shuffled", "#999999", "x"))
_MEASURES = (
    ("clip_score", "CLIP score", 1.0),
    ("top1", "top-1 retrieval, %", 100.0),
    ("top5", "top-5 retrieval, %", 100.0),
)


def _interval(value: Estimate | None, scale: float = 1.0) -> str:
    if value is None:
        return "–"
    return f"{scale * value.value:.1f} ({scale * value.low:.1f}–{scale * value.high:.1f})"


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _shares(result: SetResult) -> list[str]:
    return [f"{result.share[key]:.0%}" if key in result.share else "–" for key in ("clip_score", "top1", "top5")]


def score_rows(report: Report) -> list[tuple[str, ...]]:
    """The score table's cells, under HEADER: per set the real, generated and shuffled rows and generated ÷ real."""
    rows = []
    for result in report.sets:
        title = f"{result.name} (n={result.count})"
        for kind in KINDS:
            row: Row = getattr(result, kind)
            near = row.nearest
            cells = [_interval(row.clip_score), _interval(row.top1, 100), _interval(row.top5, 100)]
            cells += [_number(row.frechet_real), _number(row.frechet_train)]
            cells += [_number(near.rms_median if near else None), _number(near.cosine_median if near else None, 3)]
            cells += [_number(100 * near.suspicious if near else None)]
            rows.append((title, KINDS[kind], *cells))
            title = ""
        rows.append(("", "generated ÷ real", *_shares(result), "", "", "", "", ""))
    return rows


def scene_rows(report: Report) -> list[tuple[str, ...]]:
    """The scene table's cells, under _SCENE_HEADER; empty without scenes."""
    rows = []
    for result in report.sets:
        for kind, scores in (result.scenes or {}).items():
            cells = (scores.background, scores.number, scores.layout, scores.relation)
            rows.append((KINDS[kind], *(_interval(value, 100) for value in cells)))
    return rows


def remarks(report: Report) -> list[str]:
    """What a reader needs to read the tables right."""
    lines = [
        *report.notes,
        "FD: Fréchet distance. RMS: to the nearest training picture, median. susp.: share of pictures nearer to "
        "training than all but 5 % of the real held-out ones.",
    ]
    for result in report.sets:
        lines.append(
            f"{result.name}: {result.count} pictures; top-1 and top-5 among {result.pool} captions, guessing finds "
            f"{100 * result.chance_top1:.1f} % and {100 * result.chance_top5:.1f} %."
        )
        if result.frechet_absent:
            lines.append(f"{result.name}: no Fréchet distance, {result.frechet_absent}.")
    return lines


def tables(report: Report) -> list[Table]:
    """The tables for a terminal of 80 columns, without intervals: scores and, with scenes, shares found right."""
    scores = _table("set", "CLIP", "top-1", "top-5", "FD real", "FD train", "RMS", "susp.")
    scenes = _table("scenes found right", "background", "number", "layout", "relation")
    for result in report.sets:
        scores.add_row(result.name, style="bold")
        for kind in KINDS:
            row: Row = getattr(result, kind)
            near = row.nearest
            cells = [f"{row.clip_score.value:.1f}", _percent(row.top1), _percent(row.top5)]
            cells += [_number(row.frechet_real), _number(row.frechet_train)]
            cells += [_number(near.rms_median), f"{near.suspicious:.0%}"] if near else ["–", "–"]
            scores.add_row(f" {KINDS[kind]}", *cells)
        scores.add_row(" generated ÷ real", *_shares(result))
        for kind, found in (result.scenes or {}).items():
            parts = (found.background, found.number, found.layout, found.relation)
            scenes.add_row(KINDS[kind], *(_percent(part) for part in parts))
    return [scores, scenes] if scenes.rows else [scores]


def _table(*header: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _percent(value: Estimate | None) -> str:
    return "–" if value is None else f"{value.value:.1%}"


def _markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def markdown(report: Report) -> str:
    """The report as one page: protocol in a line, tables, remarks."""
    protocol = report.protocol
    system, judge, sampler = protocol["system"], protocol["judge"], protocol["sampler"]
    parts = [
        f"# Scores of {system['name']}",
        f"{system['kind']} `{system['sha256'][:12]}`, judge `{judge['sha256'][:12]}`, data {protocol['data']['name']} "
        f"`{protocol['data']['fingerprint'][:12]}`, {sampler['num_inference_steps']} steps, guidance "
        f"{sampler['guidance_scale']:g}, seed {protocol['seed']}, {protocol['image_size']} px. 95 % intervals by "
        "bootstrap over pictures.",
        _markdown_table(HEADER, score_rows(report)),
    ]
    if scenes := scene_rows(report):
        parts += ["Composed scenes, share found right:", _markdown_table(_SCENE_HEADER, scenes)]
    parts.append("\n".join(f"- {line}" for line in remarks(report)))
    return "\n\n".join(parts) + "\n"


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
