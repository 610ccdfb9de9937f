"""`serve` and `web-build`: the page that draws in a browser, from this machine or as files for any host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pocketfusion.cli import app
from pocketfusion.cli.shared import model_folder
from pocketfusion.cli.shared_options import OutArg
from pocketfusion.errors import PocketfusionError

if TYPE_CHECKING:
    from pocketfusion.serve.site import Entry
    from pocketfusion.terminal import Console

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
