"""Pictures of a search: the frontier, and SnapFusion's Figure 5 (score drop of each removed block)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketfusion.errors import PocketfusionError
from pocketfusion.evolve.actions import short_name
from pocketfusion.models.elastic.architecture import BlockName

_COLOURS = {"resnets": ("#f2b183", "#c8551b"), "attentions": ("#9fc5e8", "#1f5fbf")}  #: before, after training
_KINDS = {"attentions": "cross-attention", "resnets": "ResNet"}


def frontier_points(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One point a round of actions.json: its number, latency, score with standard error, and what led to it."""
    points, label = [], "start"
    for entry in rounds:
        point = {key: entry[key] for key in ("number", "latency_ms", "score", "error", "undone")}
        points.append(point | {"actions": label})
        taken = [value["action"] for value in entry["taken"]]
        removed = sum(action["kind"] == "remove" for action in taken)
        copied = sum(action["kind"] == "duplicate" for action in taken)
        dropped = sum(action["kind"] == "drop" for action in taken)
        thinned = len(taken) - removed - copied - dropped
        counts = (
            (f"-{removed}", removed),
            (f"{dropped} dropped", dropped),
            (f"{thinned} thinner", thinned),
            (f"+{copied}", copied),
        )
        label = ", ".join(text for text, count in counts if count)
    return points


def plot_frontier(points: Sequence[Mapping[str, Any]], budget_ms: float, path: Path) -> None:
    """Quality (CLIP score with its standard error) against latency, one labelled point a round (PNG)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    kept = [point for point in points if not point["undone"]]
    axis.plot([p["latency_ms"] for p in kept], [p["score"] for p in kept], color="#1f5fbf", lw=1.2, zorder=1)
    for i, point in enumerate(points):
        colour = "#999999" if point["undone"] else "#1f5fbf"
        axis.errorbar(
            point["latency_ms"], point["score"], yerr=point["error"], fmt="o", color=colour, ms=5, capsize=2, lw=1
        )
        what = "start" if i == 0 else f"{point['number']}: {point['actions']}"
        axis.annotate(
            what + (" (undone)" if point["undone"] else ""),
            (point["latency_ms"], point["score"]),
            textcoords="offset points",
            xytext=(5, -5),
            fontsize=8,
            rotation=-30,
            rotation_mode="anchor",
            va="top",
        )
    axis.axvline(budget_ms, color="#2a9d3f", lw=1, ls="--", label=f"budget {budget_ms:.3g} ms")
    axis.margins(x=0.14, y=0.12)
    axis.set(xlabel="predicted latency of a guided UNet step, ms", ylabel="CLIP score (validation, 100 × cosine)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def removal_drops(ranking: Mapping[str, Any], name: str) -> dict[str, tuple[float, float]]:
    """Block → (score drop, standard error), in network order.

    `ranking` is what `evolve --dry-run` wrote, or the actions.json of a search, whose first round is taken.
    Raises PocketfusionError if it holds no removals.
    """
    try:
        ranking = ranking["rounds"][0] if "rounds" in ranking else ranking
        removals = [value for value in ranking["values"] if value["action"]["kind"] == "remove"]
        drops = {value["action"]["block"]: (value["drop"], value["error"]) for value in removals}
    except (TypeError, KeyError, IndexError):
        drops = {}
    if not drops:
        raise PocketfusionError(f"{name} holds no removed blocks: write it with 'pocketfusion evolve --dry-run --out'")
    return drops


def plot_drops(
    before: Mapping[str, tuple[float, float]], after: Mapping[str, tuple[float, float]], path: Path
) -> None:
    """SnapFusion's Figure 5: score drop of each single removed block, before and after robust training (PNG).

    Blocks stand in network order under their stage; colour is the kind, the pale bar is before, the full one after.
    Raises PocketfusionError if the two are not of the same blocks.
    """
    if list(before) != list(after):
        other = next((b for b in [*before, *after] if b not in before or b not in after), "the order")
        raise PocketfusionError(f"the two rankings are not of the same blocks: {other} is in one of them only")
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    blocks = list(before)
    figure = Figure(figsize=(max(7.0, 0.34 * len(blocks) + 1.5), 4.6), layout="constrained")
    axis = figure.subplots()
    for i, block in enumerate(blocks):
        pale, full = _COLOURS[BlockName.parse(block).kind]
        for x, colour, (drop, error) in ((i - 0.2, pale, before[block]), (i + 0.2, full, after[block])):
            axis.bar(x, drop, width=0.4, color=colour, yerr=error, error_kw={"lw": 0.7, "ecolor": "#444444"})
    stages = [BlockName.parse(block).stage for block in blocks]
    names = [short_name(block).split(".") for block in blocks]
    axis.set_xticks(range(len(blocks)), [name[1] for name in names], fontsize=7, rotation=90)
    for i, stage in enumerate(stages):
        if i == 0 or stage != stages[i - 1]:
            end = i + stages.count(stage)
            if i:
                axis.axvline(i - 0.5, color="#bbbbbb", lw=0.8)
            axis.text(
                (i + end - 1) / 2, 1.01, names[i][0], transform=axis.get_xaxis_transform(), ha="center", fontsize=9
            )
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xlim(-0.6, len(blocks) - 0.4)
    axis.set_ylabel("CLIP score lost without the block")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    patches = []
    for kind, (pale, full) in _COLOURS.items():
        patches += [
            Patch(color=pale, label=f"{_KINDS[kind]}, before robust training"),
            Patch(color=full, label=f"{_KINDS[kind]}, after"),
        ]
    figure.legend(handles=patches, fontsize=9, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120, metadata={"Software": None})
