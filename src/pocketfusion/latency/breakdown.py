"""What a table says of its base: parameters, multiply-adds, milliseconds by stage and kind; what removal saves.

And the picture of it, after SnapFusion's Figure 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketfusion.artefact import atomic_file
from pocketfusion.latency.table import LatencyTable
from pocketfusion.latency.unet_parts import KIND_NAMES, level_sizes, list_parts, stage_names
from pocketfusion.models.elastic.architecture import Architecture

_OTHER = "other"  #: samplers, conv_in, conv_out, time embedding


@dataclass(frozen=True)
class Row:
    """Blocks of one kind in one of SnapFusion's stages; `ms` is their sum, of parts measured alone."""

    stage: str
    kind: str
    blocks: int
    parameters: int
    macs: int
    ms: float


def breakdown(table: LatencyTable, batch: int) -> list[Row]:
    """The base's rows in network order: cross-attention and ResNets of each stage, then everything else in one."""
    names = stage_names(table.base)
    rows: dict[tuple[str, str], Row] = {}
    for stage in dict.fromkeys(names.values()):
        for kind in ("attention", "resnet"):
            rows[stage, kind] = Row(stage, KIND_NAMES[kind], 0, 0, 0, 0.0)  # type: ignore[index]
    rows["", _OTHER] = Row("", _OTHER, 0, 0, 0, 0.0)
    for part in list_parts(table.base, Architecture.stock(table.base), table.text_length):
        entry = table.parts[part.key]
        place = (names.get(part.stage, ""), part.kind)
        row = rows[place if place in rows else ("", _OTHER)]
        rows[row.stage, part.kind if row.kind != _OTHER else _OTHER] = Row(
            row.stage,
            row.kind,
            row.blocks + 1,
            row.parameters + entry.parameters,
            row.macs + entry.macs,
            row.ms + entry.ms[batch].median,
        )
    return [row for row in rows.values() if row.blocks]


def removal_savings(table: LatencyTable, batch: int) -> list[tuple[str, float]]:
    """(block, ms that its removal saves) for each block of the base, most first; raises like `predict`."""
    base = Architecture.stock(table.base)
    now = table.predict(table.base, base, batch)
    saved = [(name, now - table.predict(table.base, base.remove(name), batch)) for name in base.names()]
    return sorted(saved, key=lambda item: -item[1])


_COLOURS = {KIND_NAMES["attention"]: "#d1495b", KIND_NAMES["resnet"]: "#30638e"}
_WIDTH = 0.38


def plot_table(table: LatencyTable, path: Path) -> None:
    """A panel of parameters (M) and one of milliseconds; a pair of bars a stage (PNG)."""
    from matplotlib.figure import Figure

    batch = max(table.overhead)
    rows = breakdown(table, batch)
    stages = [stage for stage in dict.fromkeys(row.stage for row in rows) if stage]
    figure = Figure(figsize=(9.5, 6.4), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    panels = (("parameters", "parameters, M", 1e-6), ("ms", "milliseconds", 1.0))
    for axis, (value, label, scale) in zip(axes, panels, strict=True):
        for side, (kind, colour) in zip((-0.5, 0.5), _COLOURS.items(), strict=True):
            heights = {row.stage: getattr(row, value) * scale for row in rows if row.kind == kind}
            places = [i + side * _WIDTH for i, stage in enumerate(stages) if stage in heights]
            bars = axis.bar(places, list(heights.values()), _WIDTH, color=colour, label=kind)
            axis.bar_label(bars, fmt=_short, fontsize=8, padding=2)
        axis.set_ylabel(label)
        axis.margins(y=0.14)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_xticks(range(len(stages)), [f"{stage}\n{_size(table, stage, stages)}" for stage in stages])
    axes[1].set_xlabel("stage (Mid: the lowest level's down, mid and up) and its latents' size")
    axes[0].legend(frameon=False, ncols=2, loc="upper left")
    overhead, settings = table.overhead[batch], table.settings
    other = sum(row.ms for row in rows if row.kind == _OTHER)
    figure.suptitle(
        f"UNet at batch {batch}: {overhead.whole.median:,.1f} ms whole, {overhead.parts:,.1f} ms as the sum of its "
        f"parts ({other:,.1f} ms in other parts)\n{settings.runtime}, {settings.backend}, {settings.weights} weights, "
        f"{settings.threads} thread{'s' if settings.threads > 1 else ''}, {settings.device}",
        fontsize=10,
    )
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=120, metadata={"Software": None})


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _size(table: LatencyTable, stage: str, stages: list[Any]) -> str:
    """Stages are levels 0, 1, …, last, …, 1, 0."""
    sizes, at = level_sizes(table.base), stages.index(stage)
    height, width = sizes[min(at, len(stages) - 1 - at)]
    return f"{height}×{width}"
