"""`device-pack` and `device-report`: a bundle to a stranger's phone over adb, and back what the phone says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.errors import PocketfusionError


@app.command("device-pack")
def device_pack_command(
    bundle: Annotated[Path, typer.Argument(help="Bundle.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write all that one run of a bundle on an Android phone needs, over adb.

    The bundle, a script around LiteRT's own benchmark, the C++ example's source, a reference picture. The benchmark
    itself is LiteRT's to fetch. `device-report` reads the results.
    """
    from pocketfusion.port.device_pack import SCRIPT, write_device_pack
    from pocketfusion.terminal import Console

    console, notes = (Console(stderr=error, highlight=False, markup=False, soft_wrap=True) for error in (False, True))
    with notes.status("drawing the reference"):
        opened = write_device_pack(bundle, out, overwrite=overwrite)
    console.print(
        f"{out}: {opened.manifest.name}; with a phone on adb: {out}/{SCRIPT} BENCHMARK_MODEL [LIBRARIES] "
        f"({out}/README.md), then pocketfusion device-report {out} REPORT.md"
    )


@app.command("device-report")
def device_report_command(
    pack: Annotated[Path, typer.Argument(help="Pack whose run.sh a phone has run.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT.md", help="Report, with OUT.json.", show_default=False)],
) -> None:
    """Write what a phone said of a device pack: device, driver, times, partitions, its pictures' PSNR."""
    from pocketfusion.artefact import atomic_file, check_files, write_json
    from pocketfusion.port.device_report import device_report, markdown, row
    from pocketfusion.terminal import Console

    if out.suffix.lower() != ".md":
        raise PocketfusionError(f"the output is {out}: give it a name that ends in .md")
    check_files(out, beside := out.with_suffix(".json"))
    report = device_report(pack)
    with atomic_file(out) as page:
        page.write_text(markdown(report), encoding="utf-8")
    write_json(beside, report)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(row(report))
    console.print(f"written: {out}, {beside}")
