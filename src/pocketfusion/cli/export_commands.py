"""`export`: model folder in, bundle out; and what it will make and take, told before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder, parse_size
from pocketfusion.cli.shared_options import DeviceOption, DiffusersArg, TargetOption
from pocketfusion.terminal import Console

if TYPE_CHECKING:
    from pocketfusion.mobile.export import ExportReport
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


_KINDS = (
    "float32, float16, int8 (every target), int8-dynamic or int4-dynamic (LiteRT), palette6, palette4 or int4-block "
    "(Core ML)"
)


@app.command("export")
def export_command(
    folder: DiffusersArg,
    out: Annotated[Path, typer.Argument(help="Bundle to write.", show_default=False)],
    device: Annotated[
        DeviceOption | None,
        typer.Option("--for", help="A device's settings; every other option still overrides.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would make and take.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"Weights of all networks: {_KINDS}.", show_default="the device's, else float32, on Core ML float16"
        ),
    ] = None,
    text_encoder_weights: Annotated[str | None, typer.Option(help="The text encoder's, if other.")] = None,
    unet_weights: Annotated[str | None, typer.Option(help="The UNet's, if other.")] = None,
    decoder_weights: Annotated[str | None, typer.Option(help="The decoder's, if other.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Weight recipe from `quantize`, instead of --weights.")] = None,
    target: Annotated[
        TargetOption | None,
        typer.Option(help="Where the bundle is to run.", show_default="the device's, else litert-cpu"),
    ] = None,
    ios: Annotated[
        int | None, typer.Option(help="Oldest iOS that is to load a Core ML bundle: 17 or 18.", show_default="17")
    ] = None,
    layout: Annotated[
        str,
        typer.Option(help="A Core ML bundle's may be apple, for Apple's Swift package; an ONNX one's diffusers."),
    ] = "bundle",
    size: Annotated[
        str | None, typer.Option(help="Pictures' HEIGHTxWIDTH in pixels.", show_default="the model's")
    ] = None,
    rewrites: Annotated[
        str,
        typer.Option(
            help="Rewrites beside the target's own: attention,serialise-conv,split-attention.", show_default=False
        ),
    ] = "",
    lora: Annotated[
        list[str] | None,
        typer.Option(help="LoRA adapter (safetensors) to merge, and how much of it: FILE[:SCALE]. Repeatable."),
    ] = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="Textual inversion (safetensors) to add. Repeatable.", show_default=False)
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="Autoencoder whose decoder to take: diffusers' folder (AutoencoderTiny too) or TAESD's decoder file.",
            show_default="the folder's",
        ),
    ] = None,
    two_calls: Annotated[
        bool | None,
        typer.Option(
            "--two-calls/--one-call",
            help="Classifier-free guidance as two calls of batch 1: less memory.",
            show_default="the device's, else one",
        ),
    ] = None,
    scheduler_step: Annotated[
        bool, typer.Option("--scheduler-step", help="Put the DDIM step into the UNet's graph.")
    ] = False,
    decoder_tile: Annotated[
        int | None,
        typer.Option(
            help="Decode in overlapping tiles of so many latents a side (0: none): less memory.",
            show_default="the device's, else 0",
        ),
    ] = None,
    gpu_fp32: Annotated[
        str | None,
        typer.Option(help="Networks that need fp32 on the GPU: text_encoder.", show_default="the device's, else none"),
    ] = None,
    gate_steps: Annotated[
        int, typer.Option(help="Sampling steps, for each of two prompts, that the result is compared on.")
    ] = 5,
    steps: Annotated[
        int | None, typer.Option(help="The bundle's default number of steps.", show_default="the folder's, else 25")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="The bundle's default guidance scale.", show_default="the folder's, else 4")
    ] = None,
    few_steps: Annotated[
        str | None,
        typer.Option(
            help="Few-step method of the --lora, or of an adapter that the folder has in it: lcm, hyper, tcd or "
            "lightning. Sets sampler, steps and guidance.",
            show_default=False,
        ),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="The bundle's sampler.", show_default="the folder's, see docs/samplers.md")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(help="TCD's fresh noise at each step, 0 to 1.", show_default="0.3")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The bundle's name. Default: OUT's last part.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle at OUT.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
) -> None:
    """Convert a model folder to a bundle for LiteRT, Core ML or ONNX Runtime, checked against PyTorch."""
    from pocketfusion.artefact import check_different, check_files, check_new, write_json
    from pocketfusion.cli.shared import require, require_compress, require_coreml, require_onnx
    from pocketfusion.folder import check_folder
    from pocketfusion.mobile.devices import DEVICES
    from pocketfusion.mobile.target_options import check_forms, check_ios

    # what needs no library is told before they load
    chosen = {"text_encoder": text_encoder_weights, "unet": unet_weights, "decoder": decoder_weights}
    forms = {network: form for network, kind in chosen.items() if (form := kind or weights)}
    where = target.value if target else DEVICES[device.value].target if device else "litert-cpu"
    check_forms(where, forms, layout)
    check_ios(where, ios, forms)
    if not folder.is_file():
        check_folder(folder)
    if not overwrite:
        check_new(out)
    check_files(json_file)
    check_different(out, json_file)
    if target is TargetOption.coreml:
        require_coreml("--target coreml")
    elif target is TargetOption.onnx:
        require_onnx("--target onnx")
    else:
        require_compress()
        require("litert_torch")
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from pocketfusion.quiet import quiet

    with quiet():  # the libraries' import messages
        from pocketfusion.mobile.export import export
        from pocketfusion.mobile.outlook import prepare

    folder = model_folder(folder)
    console = Console(highlight=False)
    given = {
        "weights": forms,
        "recipe": recipe,
        "target": None if target is None else target.value,
        "ios": ios,
        "layout": layout,
        "size": None if size is None else parse_size(size),
        "rewrites": _names(rewrites),
        "lora": tuple(_parse_lora(each) for each in lora or ()),
        "embedding": tuple(embedding or ()),
        "vae": vae,
        "two_calls": two_calls,
        "scheduler_step": scheduler_step,
        "decoder_tile": decoder_tile,
        "gpu_fp32": None if gpu_fp32 is None else _names(gpu_fp32),
        "gate_steps": gate_steps,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "few_steps": few_steps,
        "sampler": sampler,
        "eta": eta,
    }
    outlook = prepare(folder, out, given, None if device is None else device.value, overwrite)
    show(outlook, out, console)
    if dry_run:
        if json_file:
            write_json(json_file, outlook.as_dict())
        return
    outlook.check(out)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("loading")
        report = export(
            folder,
            out,
            name=name,
            overwrite=overwrite,
            progress=lambda stage, index, count: bar.update(task, description=stage, completed=index, total=count),
            **outlook.options,
        )
    _print(report, console)
    show_next(outlook.settings, out, console)
    if json_file:
        write_json(json_file, report.as_dict())


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parse_lora(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE`; a file whose own name ends so is meant whole."""
    file, colon, scale = text.rpartition(":")
    try:
        return (Path(text), 1.0) if not colon or Path(text).exists() else (Path(file), float(scale))
    except ValueError:
        return Path(text), 1.0


def _slashed(exact: float | None, rounded: float | None, digits: int) -> str:
    return " / ".join(f"{number:.{digits}f}" for number in (exact, rounded) if number is not None)


def _print(report: ExportReport, console: Console) -> None:
    from rich.table import Table

    table = Table("network", "weights", "MB", "parameters", "MACs", "SQNR dB", "guidance delta")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in report.networks:
        cells = (f"{row.size / 1e6:.2f}", f"{row.parameters / 1e6:.2f} M", f"{row.macs / 1e6:,.0f} M")
        sqnr = _slashed(row.sqnr_db, row.fp16_sqnr_db, 1)
        delta = _slashed(row.guidance_delta, row.fp16_guidance_delta, 4)
        table.add_row(row.name.replace("_", " "), row.weights, *cells, sqnr, delta)
    console.print(table)
    if any(row.fp16_sqnr_db is not None for row in report.networks):
        console.print(
            "before the slash in FP32, after it with each operation's result rounded to FP16", soft_wrap=True
        )
    if report.lora_layers_left_out:
        console.print(
            f"{report.lora_layers_left_out} LoRA layers are of blocks that were cut from this model and are left out"
        )
    steps = f"{report.num_inference_steps} step{'s' if report.num_inference_steps > 1 else ''}"
    drawn = f"sampler {report.sampler}, {steps}, guidance {report.guidance_scale:g}"
    size = f"{report.size / 1e6:.2f} MB, {drawn}"
    peak = f"; peak memory {report.peak_rss / 1e6:,.0f} MB" if report.peak_rss else ""
    console.print(f"{report.bundle}: {size}{peak}")
