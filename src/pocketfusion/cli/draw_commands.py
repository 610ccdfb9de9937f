"""`generate`, `serve`, `web-build`: pictures on this machine, and the page that draws in a browser."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder
from pocketfusion.cli.shared_options import OutArg, ThreadsOpt
from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from PIL import Image

    from pocketfusion.runtime.manifest import Guidance
    from pocketfusion.runtime.pipeline import Array, GenerationResult, Pipeline
    from pocketfusion.runtime.residency import Mode
    from pocketfusion.serve.site import Entry
    from pocketfusion.terminal import Console


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Argument(help="What to draw. An empty prompt draws without one.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT.png", help="PNG file to write.")] = Path(
        "out.png"
    ),
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps. Default: the bundle's.")] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Guidance scale, 1 for none. Default: the bundle's.")
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", metavar="NAME", help="One of those that info lists. Default: the bundle's."),
    ] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", help="TCD's fresh noise at each step, 0 to 1. Default: the bundle's.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="First picture's seed. Default: random, printed.")] = None,
    count: Annotated[int, typer.Option("--count", help="Pictures to draw; picture i takes seed + i.")] = 1,
    negative: Annotated[str, typer.Option("--negative", help="What the pictures should not show.")] = "",
    preview: Annotated[
        Path | None, typer.Option("--preview", metavar="DIR", help="Also write a picture per step here.")
    ] = None,
    preview_by: Annotated[
        str | None, typer.Option("--preview-by", help="decoder, or linear: for next to nothing, without detail.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", metavar="PATH", help="Bundle to run. Default: the embedded one.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write settings, times and memory as JSON.")
    ] = None,
    threads: ThreadsOpt = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode", help="resident (all networks in memory), pipelined (UNet and one other) or sequential (one)."
        ),
    ] = None,
    memory_budget: Annotated[
        float | None, typer.Option("--memory-budget", metavar="MB", help="Choose the fastest mode that fits.")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="Of ONNX bundles: onnxruntime, openvino or openvino-bf16. Default: the bundle's.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE.json", help="Write what was in memory when, and FILE.png of it."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="DIR", help="Keep packed weights here, for quicker starts."),
    ] = None,
) -> None:
    """Draw pictures of a prompt with a bundle, on LiteRT or ONNX Runtime.

    With `--count`, OUT.png becomes OUT_0.png, OUT_1.png, … and a contact sheet OUT_sheet.png.
    """
    _check_outputs(output, preview, json_file, trace, count)
    if preview_by not in (None, "decoder", "linear"):
        raise PocketfusionError(f"--preview-by is {preview_by!r}: choose decoder or linear")
    if preview is None and preview_by is not None:
        raise PocketfusionError(f"--preview-by is {preview_by} without previews: give --preview DIR, or leave it out")
    if preview is not None and mode == "sequential" and preview_by != "linear":
        raise PocketfusionError(
            "--preview needs the decoder beside the UNet: give --preview-by linear, or choose --mode pipelined"
        )
    from pocketfusion.artefact import write_json
    from pocketfusion.runtime.output import record
    from pocketfusion.runtime.pipeline import Pipeline
    from pocketfusion.terminal import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    notes = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    with _Bar(notes) as bar:
        pipeline = Pipeline.load(
            bundle,
            threads,
            mode=cast("Mode | None", mode),
            memory_budget=memory_budget,
            runtime=runtime,
            trace=trace,
            cache=cache,
        )
        num_steps = pipeline.manifest.defaults.num_inference_steps if steps is None else steps
        bar.start(count, num_steps)

        def callback(step: int, timestep: float, latents: Array) -> None:
            index = bar.advance()
            if preview is not None:
                picture = pipeline.preview(latents) if preview_by == "linear" else pipeline.decode(latents)
                _save_preview(picture, preview, (index, count), (step, num_steps))

        result = pipeline.generate(
            prompt,
            negative_prompt=negative,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            num_images=count,
            sampler=sampler,
            eta=eta,
            callback=callback,
        )
    for warning in result.warnings:
        notes.print(f"warning: {warning}", style="yellow")
    files, sheet = _save(pipeline, result, output)
    if json_file is not None:
        write_json(json_file, record(pipeline, result, files, sheet))
    _report(console, result, files, sheet, pipeline.manifest.guidance)
    if memory_budget is not None:
        console.print(f"mode {pipeline.mode}, chosen for a budget of {memory_budget:g} MB")
    if trace is not None:
        console.print(f"{trace}  {pipeline.trace.picture}  timeline of memory")


def _check_outputs(output: Path, preview: Path | None, json_file: Path | None, trace: Path | None, count: int) -> None:
    """Fails before any work is done if something could not be written at its end."""
    from pocketfusion.artefact import check_files, check_writable_parent
    from pocketfusion.runtime.trace import check_trace

    if output.suffix.lower() != ".png":
        raise PocketfusionError(f"the output is {output}: give it a name that ends in .png")
    pictures = [*_names(output, count), _sheet(output)] if 1 < count < 10_000 else [output]
    if trace is not None:
        check_trace(trace)
    check_files(*pictures, json_file, *((trace, trace.with_suffix(".png")) if trace else ()))
    if preview is not None:
        if preview.exists() and not preview.is_dir():
            raise PocketfusionError(f"{preview} is a file: --preview takes a folder")
        check_writable_parent(preview / "step.png" if preview.is_dir() else preview)


def _names(output: Path, count: int) -> list[Path]:
    """The files of `count` pictures."""
    digits = len(str(count - 1))
    return [output.with_stem(f"{output.stem}_{i:0{digits}}") for i in range(count)] if count > 1 else [output]


def _sheet(output: Path) -> Path:
    return output.with_stem(f"{output.stem}_sheet")


class _Bar:
    """Progress of a generation on `console`: the load, then step, time per step, elapsed and left. Terminals only."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        elapsed, left = TimeElapsedColumn(), TimeRemainingColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), elapsed, TextColumn("elapsed,"), left)
        self._progress = Progress(
            *columns, TextColumn("left"), console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("loading the bundle", total=None)
        self._count = self._steps = self._done = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def start(self, count: int, steps: int) -> None:
        """Begins counting `steps` steps of each of `count` pictures."""
        self._count, self._steps, self._began = count, steps, time.perf_counter()
        self._progress.reset(self._task, total=count * steps, description="encoding the prompt")

    def advance(self) -> int:
        """Counts a finished step and returns the index of the picture that it belongs to."""
        index, step = divmod(self._done, self._steps)
        self._done += 1
        picture = f"picture {index + 1}/{self._count}, " if self._count > 1 else ""
        pace = 1000 * (time.perf_counter() - self._began) / self._done
        description = f"{picture}step {step + 1}/{self._steps}, {pace:.0f} ms each"
        self._progress.update(self._task, completed=self._done, description=description)
        return index


def _save_preview(picture: Image.Image, folder: Path, image: tuple[int, int], step: tuple[int, int]) -> None:
    """Writes the picture after a step: step_01.png, or 3_step_01.png for picture 3 of several."""
    from pocketfusion.runtime.output import save_png

    folder.mkdir(exist_ok=True)
    prefix = f"{image[0]:0{len(str(image[1] - 1))}}_" if image[1] > 1 else ""
    name = f"{prefix}step_{step[0] + 1:0{len(str(step[1]))}}.png"
    save_png(picture, folder / name, {"step": f"{step[0] + 1} of {step[1]}"})


def _save(pipeline: Pipeline, result: GenerationResult, output: Path) -> tuple[list[Path], Path | None]:
    from pocketfusion.runtime.output import png_text, save_png
    from pocketfusion.runtime.result import contact_sheet

    count = len(result.images)
    files = _names(output, count)
    for i, (image, file) in enumerate(zip(result.images, files, strict=True)):
        save_png(image, file, png_text(pipeline, result, i))
    if count == 1:
        return files, None
    sheet = _sheet(output)
    captions = [f"{result.prompt or '(no prompt)'} · seed {seed}" for seed in result.seeds]
    save_png(contact_sheet(result.images, captions), sheet, {"prompt": result.prompt})
    return files, sheet


def _report(
    console: Console, result: GenerationResult, files: list[Path], sheet: Path | None, guidance: Guidance
) -> None:
    width, height = result.images[0].size
    for file, seed in zip(files, result.seeds, strict=True):
        console.print(f"{file}  {width}×{height}  seed {seed}")
    if sheet is not None:
        console.print(f"{sheet}  contact sheet")
    timings, steps = result.timings, result.num_inference_steps
    memory = f", peak memory {result.peak_rss / 1e6:.0f} MB" if result.peak_rss else ""
    kind = "" if guidance == "classifier-free" else f"{guidance} "
    import statistics

    pace = f"{1000 * statistics.median(timings.steps):.1f} ms"
    console.print(
        f"{timings.total:.2f} s: {steps} step{'s' if steps > 1 else ''} of {pace}, "
        f"{kind}guidance {result.guidance_scale:g} (load {timings.load:.2f} s{memory})"
    )


Bundles = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[BUNDLE]...", help="Bundles that the page offers. Default: the embedded one."),
]
WebGpu = Annotated[
    Path | None,
    typer.Option(
        "--webgpu",
        metavar="FOLDER",
        help="Model folder of a bundle: makes its WebGPU form once and keeps it (needs pocketfusion[compress]).",
    ),
]


@app.command("serve")
def serve_command(
    bundles: Bundles = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for your network, with a QR code.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on, 0 for any that is free.")] = 8000,
    webgpu: WebGpu = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="PEM", help="Serve HTTPS with this certificate.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="PEM", help="The certificate's private key.")] = None,
) -> None:
    """Serve the page that draws in a browser, on this machine alone unless --host says otherwise."""
    if (certificate is None) != (key is None):
        raise PocketfusionError("--certificate and --key go together: give both files or neither")
    from pocketfusion.serve.application import application
    from pocketfusion.serve.listen import addresses, bind, is_loopback, server
    from pocketfusion.terminal import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    with bind(host, port) as listening:
        entries = _entries(bundles, webgpu, console)
        local = is_loopback(host)
        urls = addresses(host, listening.getsockname()[1], certificate is not None)
        names = ["localhost", "127.0.0.1", "::1", "[::1]", host] if local else ["*"]
        serving = server(application(entries, names), certificate, key)
        for url in urls:
            console.print(url, style="bold")
        if not local:
            _print_code(urls[0], certificate is not None, console)
        console.print("Ctrl-C stops it")
        serving.run([listening])


@app.command("web-build")
def web_build_command(
    out: OutArg,
    bundles: Bundles = None,
    webgpu: WebGpu = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder at OUT.")] = False,
) -> None:
    """Write the page and bundles as a static site for any host."""
    from pocketfusion.artefact import check_new
    from pocketfusion.serve.site import write_site
    from pocketfusion.terminal import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    check_new(out, overwrite)
    report = write_site(_entries(bundles, webgpu, console), out, overwrite=overwrite)
    console.print(
        f"{report.out}: {report.files} files, {report.size / 1e6:.1f} MB; any host of static files can serve it"
    )


def _entries(paths: list[Path] | None, webgpu: Path | None, console: Console) -> list[Entry]:
    """The site of the bundles at `paths`, all verified; says which they are."""
    from pocketfusion.runtime.manifest import Bundle, embedded_bundle
    from pocketfusion.serve.application import with_siblings
    from pocketfusion.serve.site import bundle_entries, page_entries, page_folder

    bundles = [Bundle.open(path) for path in paths or [embedded_bundle()]]
    page = page_entries(page_folder())
    if webgpu is not None:
        _make_sibling(model_folder(webgpu), bundles, console)
    bundles = with_siblings(bundles)
    for bundle in bundles:
        size = sum(file.size for file in bundle.manifest.files.values())
        console.print(f"{bundle.manifest.name}  {bundle.manifest.target}  {size / 1e6:.1f} MB  {bundle.path}")
    return [*page, *bundle_entries(bundles)]


def _make_sibling(folder: Path, bundles: list, console: Console) -> None:
    from pocketfusion.cli.shared import require, require_compress

    require_compress()
    require("litert_torch")
    from pocketfusion.serve.application import make_sibling

    with console.status("making the WebGPU form") as status:
        make_sibling(folder, bundles, lambda stage, index, count: status.update(f"WebGPU form: {stage}"))


def _print_code(url: str, secure: bool, console: Console) -> None:
    import io

    import segno

    drawn = io.StringIO()
    segno.make(url, micro=False).terminal(drawn, compact=True)
    typer.echo(drawn.getvalue())
    if not secure:
        console.print(
            "Browsers give pages of plain http from another machine no WebGPU, threads or offline use: "
            "for those see --certificate, or web-build and a host with https"
        )
