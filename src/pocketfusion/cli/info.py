"""`info`: what a bundle or a model folder is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pocketfusion.cli import app
from pocketfusion.cli.given import model_folder

if TYPE_CHECKING:
    from pocketfusion.terminal import Console


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
        _print(console, about)
        (_print_origin if full else _print_origin_briefly)(console, about)
    if about["problems"]:
        raise typer.Exit(2)


_GUIDANCE = {
    "classifier-free": "two predictions a step",
    "embedded": "one prediction a step, the scale its input",
    "folded": "one prediction a step, at one scale",
}


def _print(console: Console, about: dict[str, Any]) -> None:
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
    _print_networks(console, about)


def _print_origin(console: Console, about: dict[str, Any]) -> None:
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


def _print_origin_briefly(console: Console, about: dict[str, Any]) -> None:
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


def _print_networks(console: Console, about: dict[str, Any]) -> None:
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
