"""What a table says of its base: parameters, multiply-adds, milliseconds by stage and kind; what removal saves."""

from __future__ import annotations

from dataclasses import dataclass

from pocketfusion.latency.parts import KIND_NAMES, list_parts, stage_names
from pocketfusion.latency.table import LatencyTable
from pocketfusion.models.architecture import Architecture

OTHER = "other"  #: samplers, conv_in, conv_out, time embedding


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
    rows["", OTHER] = Row("", OTHER, 0, 0, 0, 0.0)
    for part in list_parts(table.base, Architecture.stock(table.base), table.text_length):
        entry = table.parts[part.key]
        place = (names.get(part.stage, ""), part.kind)
        row = rows[place if place in rows else ("", OTHER)]
        rows[row.stage, part.kind if row.kind != OTHER else OTHER] = Row(
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
