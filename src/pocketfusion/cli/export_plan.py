"""What `export` prints before and after its work: the plan, and what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from pocketfusion.mobile.export_settings import ExportSettings
    from pocketfusion.mobile.outlook import Outlook
    from pocketfusion.terminal import Console


def show(outlook: Outlook, out: Path, console: Console) -> None:
    """The plan: what the bundle will be, and what making it takes against what this machine has."""
    from pocketfusion.artefact import free_space
    from pocketfusion.compress.overview import size
    from pocketfusion.mobile.devices import DEVICES
    from pocketfusion.runtime.memory import available_memory

    settings = outlook.settings
    height, width = outlook.picture
    device = DEVICES[settings.made_for] if settings.made_for else None
    made_for = f"{device.name}: {device.runs_on}, " if device else ""
    console.print(f"{out} ({made_for}{settings.target}), pictures of {width}×{height}", soft_wrap=True)
    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), show_footer=True)
    footers = ("together", "", f"{outlook.size / 1e6:,.1f}", "", "", "")
    names = ("network", "weights", "MB", "parameters", "MACs", "SQNR")
    for name, footer in zip(names, footers, strict=True):
        table.add_column(name, footer, justify="left" if name in names[:2] else "right", no_wrap=True)
    for row in outlook.networks:
        sqnr = "unknown" if row.sqnr_db is None else f"{row.sqnr_db:.0f} dB"
        cells = (f"{row.size / 1e6:,.1f}", f"{row.parameters / 1e6:,.1f} M", f"{row.macs / 1e9:,.1f} G", sqnr)
        table.add_row(row.name.replace("_", " "), row.weights, *cells)
    console.print(table)
    memory, free = available_memory(), free_space(out)
    tight = ": it may not be enough" if memory < outlook.memory else ""
    has = "" if memory == float("inf") else f" (free: {size(memory)}{tight})"
    lines = [
        ("form", _form(outlook)),
        ("time", _time(outlook)),
        ("memory", f"about {size(outlook.memory)}{has}"),
        ("disk", f"about {size(outlook.disk)} while it works (free: {size(free)}), {size(outlook.size)} after"),
        *zip(("quality", "", ""), _quality(outlook), strict=False),
    ]
    shown = Table.grid(padding=(0, 2, 0, 0))
    shown.add_column(no_wrap=True)
    shown.add_column()
    for name, text in lines:
        shown.add_row(name, text)
    console.print(shown)


def show_next(settings: ExportSettings, out: Path, console: Console) -> None:
    """What to do with the bundle now."""
    from pocketfusion.mobile.devices import next_steps

    console.print("next:")
    for what, why in next_steps(settings.made_for, settings.target, out, settings.layout):
        console.print(f"  {what}  ({why})", soft_wrap=True)


def _form(outlook: Outlook) -> str:
    """How the networks are called."""
    settings = outlook.settings
    tile = settings.decoder_tile
    parts = [
        f"{'two UNet calls' if outlook.calls == 2 else 'one UNet call'} of batch {outlook.batch} a guided step",
        "the decoder whole" if tile is None else f"the decoder in tiles of {tile}×{tile} latents",
    ]
    if settings.gpu_fp32:
        parts.append(f"{', '.join(settings.gpu_fp32).replace('_', ' ')} in fp32 on the GPU")
    if settings.rewrites:
        parts.append(f"rewrites {', '.join(settings.rewrites)}")
    if settings.scheduler_step:
        parts.append("the sampler's step in the UNet")
    return ", ".join(parts)


def _time(outlook: Outlook) -> str:
    """Both parts of the work, and how to shorten the second."""
    from pocketfusion.compress.overview import duration

    shorter = (
        " (--gate-steps 1 shortens that)" if outlook.settings.gate_steps > 1 and outlook.gate_seconds > 120 else ""
    )
    gate = f"{duration(outlook.gate_seconds)} of it to compare with PyTorch{shorter}"
    return f"about {duration(outlook.seconds)} on free cores, {gate}"


def _quality(outlook: Outlook) -> list[str]:
    """What quality to expect, where that was measured, and what guards it."""
    from pocketfusion.mobile.gate import MIN_SQNR

    rows = outlook.networks
    if any(row.sqnr_db is not None for row in rows):
        found = ["SQNR: what the embedded 64-pixel model kept; other trained models were not measured"]
    else:
        found = ["these forms were not measured on a trained model"]
    if all(row.weights == "int8" for row in rows):
        found.append(
            "with 8-bit weights its pictures scored as with float32: Fréchet distance 20.2 (20.3 ± 1.1), CLIP score "
            "35.0 (35.0)"
        )
    gates = sorted({MIN_SQNR[row.weights] for row in rows if row.weights in MIN_SQNR})
    least = " or ".join(f"{gate:.0f}" for gate in gates)
    below = f" (below {least} dB{', by form' if gates[1:] else ''})" if gates else ""
    return [*found, f"this model's is measured at the end, and too little{below} ends the export without a bundle"]
