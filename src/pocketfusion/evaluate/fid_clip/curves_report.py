"""The result of an evaluation for readers: a table, its remarks, one page of Markdown, and the pictures in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich import box
from rich.table import Table

from pocketfusion.artefact import write_json
from pocketfusion.evaluate.fid_clip.curves import Curve, Curves, Point, at_equal_clip
from pocketfusion.evaluate.metrics import Estimate
from pocketfusion.runtime.result import contact_sheet

HEADER = ("system", "guidance", "Fréchet", "KID ×1000", "CLIP score", "top-5 %", "diversity")
_STYLES = (
    ("#1f5fbf", "o"),
    ("#c8501e", "D"),
    ("#2a9d3f", "s"),
    ("#7a4fb5", "^"),
    ("#8c8c8c", "v"),
    ("#b58a1e", "P"),
    ("#1e9aa8", "X"),
)


def write_curves(
    result: Curves, captions: Sequence[str], rows: Sequence[tuple[str, np.ndarray]], folder: Path
) -> None:
    """Writes curve.json, curve.md, curve.png and pictures.png into an existing folder.

    `captions` and `rows` (a system's name and its pictures of them) are the sheet's.
    """

    write_json(folder / "curve.json", result.model_dump())
    (folder / "curve.md").write_text(markdown(result), encoding="utf-8")
    plot_curves(result, folder / "curve.png")
    _system_sheet(captions, rows, folder / "pictures.png")


def _measured(estimate: Estimate | None, digits: int = 2, scale: float = 1.0) -> str:
    """A value with half of its interval's width."""
    if estimate is None:
        return "–"
    half = scale * (estimate.high - estimate.low) / 2
    return f"{scale * estimate.value:.{digits}f}±{half:.{digits}f}"


def _cells(point: Point, is_best: bool) -> tuple[str, ...]:
    kid = f"{1000 * point.kid.value:.2f}±{1000 * point.kid.std:.2f}"
    mark = "*" if is_best else ""
    return (
        f"{point.guidance_scale:g}",
        _measured(point.frechet) + (mark if point.frechet else ""),
        kid + ("" if point.frechet else mark),
        _measured(point.clip_score),
        f"{100 * point.top5.value:.1f}",
        _measured(point.diversity),
    )


def rows(result: Curves) -> list[tuple[str, ...]]:
    """The table's cells, under HEADER; the real pictures last."""
    cells = [(curve.label, *_cells(point, point is curve.best)) for curve in result.curves for point in curve.points]
    score, top5 = _measured(result.real["clip_score"]), f"{100 * result.real['top5'].value:.1f}"
    return [*cells, ("real", "", "", "", score, top5, "")]


def comparison(first: Curve, other: Curve) -> str:
    """Where `other` is at or beyond `first`, in one sentence."""
    found = at_equal_clip(first, other)
    head = f"{other.label} against {first.label} at equal CLIP score"
    if found is None:
        return f"{head}: the curves have no CLIP score in common."
    shared = f"{found.clip_score[0]:.2f}–{found.clip_score[-1]:.2f}"
    score, lead = found.widest_lead
    if not found.at_or_beyond:
        return f"{head}: behind everywhere on {shared}, by {-lead:.3g} or more (least at {score:.2f})."
    where = ", ".join(f"{low:.2f}–{high:.2f}" for low, high in found.at_or_beyond)
    return f"{head}: at or below its distance at {where} of {shared}, by up to {lead:.3g} (at {score:.2f})."


def remarks(result: Curves) -> list[str]:
    """What a reader needs to read the table right."""
    protocol = result.protocol
    sets = ", ".join(f"{name} ({len(ids)})" for name, ids in protocol.get("sets", {}).items())
    first, *others = result.curves
    return [
        *(comparison(first, other) for other in others),
        *result.notes,
        f"{protocol['pictures']} pictures a point{': ' + sets if sets else ''}; the same captions and noise for every "
        "system. * is the lowest of its curve.",
        "± is half of the 95 % interval over pictures (of KID the standard deviation over subsets, of diversity over "
        "prompts); see docs/evaluate.md.",
        f"Features and CLIP score by {protocol['extractor']['name']}. The Fréchet distance compares only at equal "
        "counts, with the same extractor and captions.",
    ]


def _systems(result: Curves) -> str:
    named = []
    for curve in result.curves:
        point = curve.points[0]
        how = f"{curve.system['kind']}, {point.num_inference_steps} steps, {point.precision}"
        named.append(f"- {curve.label}: `{curve.system['sha256'][:12]}`, {how}, guidance {curve.system['guidance']}")
    return "\n".join(named)


def markdown(result: Curves) -> str:
    """The evaluation as one page."""
    protocol = result.protocol
    lines = [HEADER, tuple("---" for _ in HEADER), *rows(result)]
    parts = [
        "# Fréchet distance and CLIP score over guidance",
        _systems(result),
        f"Scored by {protocol['extractor']['name']} on {protocol['data']['name']} "
        f"(`{protocol['reference'][:12]}`), scored at {protocol['image_size']} px, seed {protocol['seed']}; "
        f"{result.curves[0].points[0].sampler}.",
        "![curves](curve.png)",
        "\n".join(f"| {' | '.join(cells)} |" for cells in lines),
        "\n".join(f"- {line}" for line in remarks(result)),
        "![pictures of the same captions](pictures.png)",
    ]
    return "\n\n".join(parts) + "\n"


def table(result: Curves) -> Table:
    """The table for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(HEADER):
        shown.add_column(name, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    for cells in rows(result):
        shown.add_row(*cells)
    return shown


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


def _system_sheet(captions: Sequence[str], rows: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """A row a system, named below each picture; its caption stands below the first row (PNG)."""
    pictures = [Image.fromarray(image) for _, images in rows for image in images]
    texts = [f"{name}: {caption}" for name, _ in rows for caption in captions]
    contact_sheet(pictures, texts, columns=len(captions)).save(path)
