"""The server's one function: an address in, what the site lists there out (ASGI, on Starlette).

A bundle for CPUs has operations that WebGPU does not take; its sibling for WebGPU is another export of the same
folder, made once and kept in the user's cache, as it is too large for the package.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pocketfusion.errors import PocketfusionError
from pocketfusion.quiet import quiet
from pocketfusion.runtime.manifest import MANIFEST, Bundle
from pocketfusion.serve.site import Entry, model_of, state_of

#: WebAssembly is compiled, and nothing is evaluated; nothing is fetched from or sent to anywhere else.
POLICY: Final = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; connect-src 'self'; "
    "style-src 'self'; img-src 'self' blob: data:; manifest-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
#: With the first three the page is isolated from other origins, which threads in WebAssembly need.
HEADERS: Final = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked again each time, answered by the ETag
}


def application(entries: Iterable[Entry], hosts: list[str]) -> Starlette:
    """Serves `entries` to requests for one of `hosts` (`*`: any), with GET and HEAD, byte ranges and ETags.

    A file that changed since it was listed is gone: its hash would not fit, and it might be another one.
    """
    table = {f"/{entry.name}": entry for entry in entries}
    if "/index.html" in table:
        table["/"] = table["/index.html"]

    async def answer(request: Request) -> Response:
        entry = table.get(request.scope["path"])
        return PlainTextResponse("Not found", 404) if entry is None else _answer(entry, request.headers)

    served = Starlette(
        routes=[Route("/{path:path}", answer, methods=["GET"])],
        middleware=[Middleware(_WithHeaders), Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )
    served.router.redirect_slashes = False
    return served


def _answer(entry: Entry, headers: Headers) -> Response:
    about = None
    if entry.file is not None:
        try:
            about = os.lstat(entry.file)
        except OSError:
            about = None
        if about is None or state_of(about) != entry.state:
            return PlainTextResponse("This file has changed since the server was started: start it again", 410)
    zipped = entry.gzipped is not None and _takes_gzip(headers.get("accept-encoding", ""))
    own = {"ETag": f'"{entry.sha256}{"-gzip" if zipped else ""}"'}
    if entry.gzipped is not None:
        own["Vary"] = "Accept-Encoding"
    if _matches(headers.get("if-none-match", ""), own["ETag"]):
        return Response(status_code=304, headers=own)
    if entry.file is not None:
        return FileResponse(entry.file, headers=own, media_type=entry.media_type, stat_result=about)
    if zipped:
        return Response(entry.gzipped, headers={**own, "Content-Encoding": "gzip"}, media_type=entry.media_type)
    return Response(entry.read(), headers=own, media_type=entry.media_type)


def _matches(wanted: str, etag: str) -> bool:
    tags = [tag.strip().removeprefix("W/") for tag in wanted.split(",")]
    return etag in tags or tags == ["*"]


def _takes_gzip(accepted: str) -> bool:
    for part in accepted.lower().split(","):
        name, _, quality = part.partition(";")
        if name.strip() in ("gzip", "*"):
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


class _WithHeaders:
    """Puts `HEADERS` on every answer, also on refusals."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        await self.app(scope, receive, with_headers)


_TARGET = "litert-gpu"


def cached(model: str) -> Path:
    """Where the WebGPU bundle of a model is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pocketfusion"
    return cache / f"webgpu-{model[:16]}-{model.rpartition('-')[2]}"


def with_siblings(bundles: Iterable[Bundle]) -> list[Bundle]:
    """The bundles, each with its WebGPU sibling behind it if the cache has one and it is not among them already."""
    given = list(bundles)
    models = {model_of(bundle) for bundle in given if bundle.manifest.target == _TARGET}
    found = []
    for bundle in given:
        found.append(bundle)
        model = model_of(bundle)
        if model and model not in models and (cached(model) / MANIFEST).is_file():
            models.add(model)
            found.append(Bundle.open(cached(model)))
    return found


def make_sibling(folder: Path, bundles: Iterable[Bundle], progress: Callable[[str, int, int], None]) -> Path:
    """The WebGPU bundle of `folder`, as `export --for browser` makes it, in the cache; made now unless it is there.

    It has the name, the defaults and the pictures' size of the one of `bundles` that was made from `folder`.
    Raises PocketfusionError if there is none, or as `export`.
    """
    from pocketfusion.folder import check_folder, folder_hash

    check_folder(folder)
    made = folder_hash(folder)
    found = ((bundle, model) for bundle in bundles if (model := model_of(bundle)) and model.startswith(made))
    bundle, model = next(found, (None, ""))
    if bundle is None:
        raise PocketfusionError(
            f"{folder} is not the model folder of any bundle given: give the one that it was exported from"
        )
    out, manifest = cached(model), bundle.manifest
    if not (out / MANIFEST).is_file():
        with quiet():  # the libraries' import messages
            from pocketfusion.mobile.export import export
            from pocketfusion.mobile.outlook import prepare
        out.parent.mkdir(parents=True, exist_ok=True)
        given = {**manifest.defaults.model_dump(), "size": (manifest.image.height, manifest.image.width)}
        options = prepare(folder, out, given, "browser", overwrite=True).options
        export(folder, out, name=manifest.name, overwrite=True, progress=progress, **options)
    return out
