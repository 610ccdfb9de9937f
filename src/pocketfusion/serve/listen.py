"""A port to listen on, the addresses that lead to it, and the server on it (uvicorn)."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pocketfusion.errors import PocketfusionError

_PATIENCE = 20.0  #: seconds that a client has for a request's head
_CONNECTIONS = 256  #: at a time; a page and its workers have about ten


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens on `host` and `port` (0: any free one); raises PocketfusionError where it cannot."""
    if not 0 <= port <= 65535:
        raise PocketfusionError(f"the port is {port}: choose 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise PocketfusionError(
            f"there is no host {host!r}: choose 127.0.0.1, 0.0.0.0 or this machine's name"
        ) from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        listening.close()
        reason = {errno.EADDRINUSE: "is in use", errno.EACCES: "needs more rights"}.get(error.errno or 0)
        what = f"port {port} of {host} {reason}" if reason else f"cannot listen on {host} ({error.strerror})"
        raise PocketfusionError(f"{what}: choose another with {'--port' if reason else '--host'}") from None
    return listening


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def addresses(host: str, port: int, secure: bool) -> list[str]:
    """What to type into a browser, the best first: one in the local network for a server that listens everywhere."""
    try:
        every = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        every = False
    hosts = [*_outward(), "localhost"] if every else [f"[{host}]" if ":" in host else host]
    return [f"http{'s' if secure else ''}://{name}:{port}/" for name in hosts]


def _outward() -> list[str]:
    """This machine's own address in its network: the one that it would send from. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation
            found = str(probe.getsockname()[0])
        except OSError:
            return []
    return [] if found == "0.0.0.0" else [found]


class _Patient(H11Protocol):
    """Closes connections whose next request does not come: uvicorn waits for a first one, and for the rest of any
    head, for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(_PATIENCE, self.transport.close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def server(app: Any, certificate: Path | None = None, key: Path | None = None) -> uvicorn.Server:
    """What serves `app` until Ctrl-C, by `run([socket])`; PocketfusionError for a certificate that cannot be used."""
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients send wrong is theirs
    config = uvicorn.Config(
        app,
        http=_Patient,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=1,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    try:
        if key is not None and b"ENCRYPTED" in key.read_bytes():  # the terminal would be asked for its pass phrase
            raise PocketfusionError(f"the key {key} has a pass phrase: give one without (openssl pkey -in {key})")
        config.load()
    except OSError as error:
        reason = error.strerror
        if isinstance(error, ssl.SSLError):  # whose own words name a line of OpenSSL's source
            other = error.reason == "KEY_VALUES_MISMATCH"
            reason = "the key is another certificate's" if other else "they are not both in PEM form"
        raise PocketfusionError(
            f"the certificate {certificate} and its key {key} cannot be used ({reason}): check both files"
        ) from None
    return uvicorn.Server(config)
