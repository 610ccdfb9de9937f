"""Requests that no browser sends: nothing leaks, nothing breaks, nothing stays open."""

from __future__ import annotations

import logging
import os
import random
import socket
import time
from contextlib import suppress
from urllib.parse import quote

import pytest
from serving import SECRET

METHODS = (
    "GET",
    "GET",
    "GET",
    "GET",
    "HEAD",
    "POST",
    "PUT",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "PATCH",
    "CONNECT",
    "get",
    "X" * 40,
)
#: What an answer may begin with.
STATUSES = {100, 200, 206, 304, 400, 404, 405, 410, 416, 431}


def path_of(rng: random.Random, known: list[str]) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(known)
    base = rng.choice(known).rpartition("/")[0]
    up = rng.choice(("..", "%2e%2e", "..%2f", ".%2e", "%252e%252e", "..\\", "..%5c", "..;", "%c0%ae%c0%ae", "....//"))
    target = rng.choice(("secret.txt", ".env", ".git/config", "link.txt", "etc/passwd", "site.py", "index.html.gz"))
    if kind == 1:
        return "/" + "/".join([up] * rng.randint(1, 9)) + "/" + target
    if kind == 2:
        return f"{base}/" + "/".join([up] * rng.randint(1, 6)) + "/" + target
    if kind == 3:
        return rng.choice(known) + rng.choice(("/", "%00", "%00.png", "?x=1", "#y", "::$DATA", ".gz", "~", "//", "/."))
    if kind == 4:
        return "/" + quote("".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randint(1, 30))))
    if kind == 5:
        return rng.choice(("http://evil.example/", "*", "//", "/%", "/%zz", "file:///etc/passwd", "?", ""))
    if kind == 6:
        return "/" + "a" * rng.choice((300, 5000, 70_000))
    return "/" + target


def header_of(rng: random.Random) -> str:
    numbers = [str(rng.choice((0, 1, 9, 65_535, 2**31, 2**63, 10**40, rng.randrange(10**8)))) for _ in range(2)]
    return rng.choice(
        (
            f"Range: bytes={'-'.join(numbers)}",
            f"Range: bytes=-{numbers[0]}",
            f"Range: bytes={numbers[0]}-",
            "Range: bytes=" + ",".join(f"{i * 7}-{i * 7 + 3}" for i in range(rng.choice((2, 40, 400)))),
            "Range: bytes=" + ",".join(["0-"] * rng.choice((3, 90))),
            rng.choice(
                ("Range: lines=1-2", "Range: bytes", "Range: bytes=a-b", "Range: bytes=--1", "Range: bytes=²-³")
            ),
            "If-None-Match: " + rng.choice(("*", '"', 'W/"x"', ",,,", '"a", "b"')),
            "If-Range: " + rng.choice(('"x"', "Wed, 21 Oct 2015 07:28:00 GMT", "")),
            "Accept-Encoding: " + rng.choice(("gzip", "gzip;q=0", "br", "*", "gzip;q=x", ", ,gzip;;", "identity;q=0")),
            "Content-Length: " + rng.choice(("0", "5", "-1", "x", "99999999999999999999")),
            "Transfer-Encoding: " + rng.choice(("chunked", "gzip", "chunked, chunked")),
            "Upgrade: websocket\r\nConnection: Upgrade",
            "Expect: 100-continue",
            "X: " + "y" * rng.choice((10, 9000, 70_000)),
            ": nothing",
            "Host: other.example",
        )
    )


def request_of(rng: random.Random, known: list[str]) -> bytes:
    host = rng.choice(("localhost", "localhost", "localhost", "127.0.0.1:80", "evil.example", "", "[::1", "a b"))
    lines = [
        f"{rng.choice(METHODS)} {path_of(rng, known)} HTTP/{rng.choice(('1.1', '1.1', '1.1', '1.0', '2.0', '9'))}"
    ]
    lines += [f"Host: {host}", *(header_of(rng) for _ in range(rng.randrange(3))), "Connection: close"]
    raw = ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "replace")
    if rng.random() < 0.1:
        raw = bytearray(raw)
        for _ in range(rng.randint(1, 8)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        raw = bytes(raw)
    return raw


def one(port: int, rng: random.Random, known: list[str]) -> bytes | None:
    """Sends a request as one of several kinds of client; what was answered if the client stayed to hear it."""
    raw, kind = request_of(rng, known), rng.random()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        if kind < 0.02:  # leaves before it has asked
            connection.sendall(raw[: rng.randrange(len(raw))])
            return None
        if kind < 0.04:  # asks a byte at a time
            for i in range(0, min(len(raw), 60)):
                connection.sendall(raw[i : i + 1])
            connection.sendall(raw[60:])
        else:
            connection.sendall(raw)
        if kind > 0.97:  # leaves in the middle of the answer
            connection.recv(10)
            return None
        with suppress(OSError):  # reset meanwhile is "not connected", which is no ConnectionError
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        with suppress(ConnectionError):
            while part := connection.recv(1 << 18):
                answer += part
                if kind > 0.95:  # reads slowly
                    time.sleep(0.001)
        return answer


@pytest.mark.parametrize("count", [250, pytest.param(10_000, marks=pytest.mark.slow)])
def test_odd_requests_leak_nothing_and_break_nothing(serving, site, caplog, count):
    rng = random.Random(count)
    # the two large files only now and then: their bytes are most of the time
    small = [f"/{entry.name}" for entry in site if entry.file is None or entry.state[2] < 3_000_000]
    seen: dict[int, int] = {}
    with serving(site) as port, caplog.at_level(logging.WARNING):
        with suppress(OSError):
            one(port, random.Random(0), small)
        open_before = len(os.listdir("/proc/self/fd"))
        for _ in range(count):
            try:
                answer = one(port, rng, small)
            except ConnectionError:  # refused with a reset, as what was sent was not read
                continue
            if not answer:
                continue
            assert SECRET not in answer and b"root:" not in answer and b"Traceback" not in answer
            status = int(answer.split(b" ", 2)[1])
            seen[status] = seen.get(status, 0) + 1
            assert status in STATUSES, answer[:300]
        deadline = time.monotonic() + 10
        while len(os.listdir("/proc/self/fd")) > open_before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) <= open_before
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"GET /icon.png HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]
    assert {200, 400, 404, 405} <= set(seen)
    print(f"{count} requests: {dict(sorted(seen.items()))}")
