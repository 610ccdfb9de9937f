"""The result of an evaluation for readers: a table, its remarks, and one page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from pocketfusion.artefact import write_json
from pocketfusion.evaluate.curves import Curve, Curves, Point
from pocketfusion.evaluate.equal_clip import at_equal_clip
from pocketfusion.evaluate.metrics import Estimate

HEADER = ("system", "guidance", "Fréchet", "KID ×1000", "CLIP score", "top-5 %", "diversity")


def write_curves(
    result: Curves, captions: Sequence[str], rows: Sequence[tuple[str, np.ndarray]], folder: Path
) -> None:
    """Writes curve.json, curve.md, curve.png and pictures.png into an existing folder.

    `captions` and `rows` (a system's name and its pictures of them) are the sheet's.
    """
    from pocketfusion.evaluate.curves_figure import plot_curves, system_sheet

    write_json(folder / "curve.json", result.model_dump())
    (folder / "curve.md").write_text(markdown(result), encoding="utf-8")
    plot_curves(result, folder / "curve.png")
    system_sheet(captions, rows, folder / "pictures.png")


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
