"""The server's one function: an address in, what the site lists there out (ASGI, on Starlette)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pocketfusion.serve.site import Entry, state_of

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
