"""`info`, `doctor`, `architecture`, `plan`: what there is, and what would fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder
from pocketfusion.cli.shared_options import JsonOpt, ReplaceOpt
from pocketfusion.errors import PocketfusionError
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pocketfusion.recipe import Recipe
    from pocketfusion.terminal import Console
    from pocketfusion.train.memory.room import Planner, Room, Work


@app.command("info")
def info_command(
    path: Annotated[
        Path | None, typer.Argument(help="Bundle, model folder or checkpoint file. Default: the embedded bundle.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Name each licence, and all that provenance tells.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables: all there is.")] = False,
) -> None:
    """Show what a bundle or model folder is: sizes, costs, licences, provenance, hash check.

    Exits with code 2 if a file is altered or a weight is NaN.
    """
    from pocketfusion.info import describe
    from pocketfusion.runtime.manifest import embedded_bundle
    from pocketfusion.terminal import Console, printable_json

    path = model_folder(path or embedded_bundle())
    notes = Console(stderr=True, markup=False, highlight=False)
    with notes.status("reading") as status:
        about = describe(path, status.update)
    if as_json:
        typer.echo(printable_json(json.dumps(about, indent=2, ensure_ascii=False)))
    else:
        console = Console(markup=False, highlight=False, soft_wrap=True)
        _tell(console, about)
        (_tell_origin if full else _tell_origin_briefly)(console, about)
    if about["problems"]:
        raise typer.Exit(2)


_GUIDANCE = {
    "classifier-free": "two predictions a step",
    "embedded": "one prediction a step, the scale its input",
    "folded": "one prediction a step, at one scale",
}


def _tell(console: Console, about: dict[str, Any]) -> None:
    version = f", version {about['version']}, by {about['created_by']}" if "version" in about else ""
    console.print(f"{about['name']}: {about['kind']}{version}", style="bold")
    console.print(f"  path        {about['path']}")
    console.print(f"  size        {_bytes(about['size'])}")
    console.print(f"  sha256      {about['sha256']}")
    for problem in about["problems"]:
        console.print(f"  problem     {problem}", style="red")
    if not about["problems"]:
        checked = "every file's size and SHA-256 match" if about["kind"] == "bundle" else "all weights are finite"
        console.print(f"  check       ok, {checked}", style="green")
    if "image" in about:
        latents, image = about["latents"], about["image"]
        console.print(f"  pictures    {image['width']}×{image['height']} px")
        console.print(f"  latents     {latents['channels']}×{latents['height']}×{latents['width']}")
    if about.get("target"):
        coreml, onnx = about["coreml"], about["onnx"]
        more = f", iOS {coreml['ios']} and later, layout {coreml['layout']}" if coreml else ""
        more += f", operations of version {onnx['opset']}, layout {onnx['layout']}" if onnx else ""
        console.print(f"  target      {about['target']}{more}")
    if "scheduler" in about:
        scheduler = about["scheduler"]
        keys = ("prediction_type", "timestep_spacing", "beta_schedule")
        console.print(f"  scheduler   {', '.join(str(scheduler[key]) for key in keys if key in scheduler)}")
    if "samplers" in about:
        others = ", ".join(name for name in about["samplers"] if name != about["sampler"])
        eta = f" with eta {about['scheduler'].get('eta', 0.3):g}" if about["sampler"] == "tcd" else ""
        console.print(f"  sampler     {about['sampler']}{eta}{'; also ' if others else ''}{others}")
    if "defaults" in about:
        defaults = about["defaults"]
        console.print(
            f"  defaults    {defaults['num_inference_steps']} steps, guidance {defaults['guidance_scale']:g}, "
            f"prompts of up to {about['max_tokens']} tokens"
        )
    elif about.get("sampling"):
        sampling = about["sampling"]
        console.print(
            f"  sampling    {sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']:g}"
        )
    if about.get("guidance"):
        learned = about["guidance_range"]
        taught = f", taught for {learned[0]:g} to {learned[1]:g}" if learned else ""
        console.print(f"  guidance    {about['guidance']}: {_GUIDANCE[about['guidance']]}{taught}")
    if about.get("preview"):
        preview = about["preview"]
        console.print(
            f"  preview     linear, {preview['psnr_db']:.1f} dB to the decoder's pictures, R² {preview['r2']:.2f}"
        )
    _tell_networks(console, about)


def _tell_origin(console: Console, about: dict[str, Any]) -> None:
    if about["licences"]:
        console.print("licences", style="bold")
        for licence in about["licences"]:
            parts = (licence["what"], licence.get("spdx"), licence.get("attribution"))
            console.print(f"  {' · '.join(part for part in parts if part)}")
    console.print("provenance", style="bold")
    for key, value in _flatten(about["provenance"] or {}):
        console.print(f"  {key}: {value}")
    if not about["provenance"]:
        console.print("  none")


def _tell_origin_briefly(console: Console, about: dict[str, Any]) -> None:
    if about["licences"]:
        kinds = sorted({licence["spdx"] for licence in about["licences"] if licence.get("spdx")})
        files = f"{len(about['licences'])} files in {about['path']}/licences"
        console.print(
            f"  licences    {', '.join(kinds)} ({len(about['licences'])} works)" if kinds else f"  licences    {files}"
        )
    made = about["provenance"] or {}
    made = made.get("model", made)
    parts = []
    if "stage" in made:
        data = (made.get("data") or {}).get("name")
        parts.append(f"{made['stage']}{f' on {data}' if data else ''}")
    if made.get("samples_seen"):
        parts.append(f"{made['samples_seen']:,} samples")
    if made.get("hours"):
        parts.append(f"{made['hours']:.2f} h on {made.get('machine') or 'an unknown machine'}")
    console.print(f"  made by     {', '.join(parts) or 'unknown'}")
    console.print("  --full names the licences and tells the provenance", style="dim")


def _tell_networks(console: Console, about: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    bundle = about["kind"] == "bundle"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("network", no_wrap=True)
    for title in (
        "size",
        "parameters",
        "weights",
        *(("MACs", "SQNR dB", "guidance δ") if bundle else ()),
    ):
        table.add_column(title, justify="right")
    for name, network in about["networks"].items():
        title = f"{name} ({network['class']})" if "class" in network else name
        cells = [title, _bytes(network["size"]), _count(network["parameters"]), network["weights"]]
        if bundle:
            cells.append(_count(network["macs"]))
            for key, digits in (
                ("sqnr_db", 1),
                ("guidance_delta", 4),
            ):  # and rounded to fp16
                numbers = (network[key], network[f"fp16_{key}"])
                cells.append(" / ".join(f"{number:.{digits}f}" for number in numbers if number is not None))
        table.add_row(*cells)
    console.print(table)
    if "multiply_adds" in about:
        macs = about["multiply_adds"]
        text = ", ".join(f"{name} {_count(n)}" for name, n in macs.items()) if macs else about["multiply_adds_note"]
        console.print(f"multiply-adds (MACs) of one call: {text}\n")


def _flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        rows += _flatten(item, f"{prefix}{key}.") if isinstance(item, dict) and item else [(f"{prefix}{key}", item)]
    return rows


def _bytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _count(n: int) -> str:
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= factor:
            return f"{n / factor:.1f} {unit}"
    return str(n)


_STYLES = {"ok": "green", "absent": "yellow", "broken": "red"}


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a list.")] = False,
) -> None:
    """Say what this machine and installation can do, and the command for what is missing.

    Exits with code 2 if drawing does not work. What is absent is no fault: only some commands ask for it.
    """
    import json

    from pocketfusion.doctor import examine
    from pocketfusion.terminal import Console, printable_json

    with Console(stderr=True, markup=False, highlight=False).status("looking") as status:
        found = examine(lambda what: status.update(f"looking at {what}"))
    if as_json:
        typer.echo(printable_json(json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False)))
    else:
        console = Console(markup=False, highlight=False, soft_wrap=True)
        section = ""
        for one in found:
            if one.section != section:
                section = one.section
                console.print(section, style="bold")
            console.print(f"  {one.state:<7} {one.name}: {one.text}", style=_STYLES[one.state])
            if one.cure:
                console.print(f"          → {one.cure}")
    if any(one.state == "broken" for one in found):
        raise typer.Exit(2)


@app.command("architecture")
def architecture_command(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER", help="Model folder, or sd-1.5 or sd-2.1.", show_default=False)
    ],
    preset: Annotated[str | None, typer.Option("--preset", help="Architecture to apply: snapfusion.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write FOLDER with the preset's UNet here.")] = None,
    as_json: JsonOpt = False,
    overwrite: ReplaceOpt = False,
) -> None:
    """Show a UNet's blocks per stage, parameters and multiply-adds, beside a preset's.

    With --out the preset is applied to the folder: weights are carried over, nothing is trained.
    """
    from pocketfusion.cli.shared import require_compress

    require_compress()
    from pocketfusion.architecture_report import describe, open_base, table, write_preset
    from pocketfusion.terminal import Console

    if out is not None and preset is None:
        raise PocketfusionError("--out alone changes nothing: name what to apply, such as --preset snapfusion")
    base = open_base(str(model_folder(Path(source))))
    report = describe(base, preset)
    if out is not None and preset is not None:
        write_preset(base, preset, out, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table(report))
    for note in report.notes:
        console.print(note)
    if out is not None:
        console.print(f"written to {out}")


@app.command("plan")
def plan_command(
    recipe: Annotated[Path, typer.Argument(help="Recipe, such as recipes/sd15.yaml.", show_default=False)],
    gpu_gb: Annotated[
        float | None, typer.Option("--gpu-gb", metavar="GB", help="Memory of a GPU. Default: of this machine.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="SECTION", help="Only that section of the recipe.")
    ] = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Processes that share a batch.")] = 1,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Weights, moments and EMA in shards (FSDP2).")] = False,
) -> None:
    """Say how much memory each stage's training takes, part by part, and which settings make it fit. Runs nothing."""
    if gpu_gb is not None and not gpu_gb > 0:
        raise PocketfusionError(f"--gpu-gb {gpu_gb:g} is not above 0: give the memory of a GPU, such as 24")
    from pocketfusion.cli.shared import COMPRESS, quiet_libraries, require

    require(*COMPRESS)
    from pocketfusion.cli.train_commands import check_trackers_of
    from pocketfusion.recipe import load_recipe, nearest

    loaded = load_recipe(recipe)
    check_trackers_of(loaded)
    quiet_libraries()
    from pocketfusion.train.memory.room import Planner, works_of

    works = works_of(loaded)
    if stage is not None:
        names = [work.name for work in works]
        if stage not in names:
            raise PocketfusionError(f"the recipe {loaded.name} trains no {stage!r}: {nearest(stage, names)}")
        works = [work for work in works if work.name == stage]
    _check_processes(loaded, {stage} if stage else {*(work.name for work in works), "decoder"}, processes)
    kind, limit = _machine() if gpu_gb is None else ("cuda", 1e9 * gpu_gb)
    planner = Planner(kind, processes, fsdp)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    where = "GPU" if kind == "cuda" else "this machine's CPU"
    console.print(
        f"{loaded.name}: {limit / 1e9:.1f} GB of {where}, {processes} process{'es' if processes > 1 else ''}"
    )
    for work in works:
        _show(console, planner, work, limit)


def _check_processes(recipe: Recipe, sections: set[str], processes: int) -> None:
    """Raises PocketfusionError for a section whose batch they cannot share: else it is told hours later."""
    from pocketfusion.train.memory.micro_batch import parts_of

    for name, section in recipe:
        if name in sections and section is not None:
            try:
                parts_of(section.train, processes)
            except PocketfusionError as error:
                raise PocketfusionError(f"{name}: {error}") from None


def _machine() -> tuple[str, float]:
    import torch

    from pocketfusion.runtime.memory import available_memory

    if torch.cuda.is_available():
        return "cuda", float(torch.cuda.mem_get_info()[1])
    return "cpu", available_memory()


def _show(console: Console, planner: Planner, work: Work, limit: float) -> None:
    from pocketfusion.train.memory.room import ladder

    count = f"{work.student.parameters / 1e6:,.1f} M parameters"
    console.print(f"\n{work.name}: {count}, batch {work.train.batch_size}")
    if work.train.micro_batch != "auto":
        room = planner.room(work)
        verdict = "fits" if room.peak <= limit else "does not fit"
        console.print(f"  in parts of {room.micro_batch}, as the recipe says: {_sum(room)}: {verdict}")
    for name, train, room_found in ladder(planner, work, limit):
        if room_found is None:
            console.print(f"  {name}: {_sum(planner.room(work, train, 1))} for one sample: does not fit")
        else:
            console.print(f"  {name}: micro_batch {room_found.micro_batch}: {_sum(room_found)}")


def _sum(room: Room) -> str:
    terms = " + ".join(f"{name} {value / 1e9:.2f}" for name, value in room.parts.items())
    return f"{terms} = {room.peak / 1e9:.1f} GB"
