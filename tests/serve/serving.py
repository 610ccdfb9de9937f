"""A raw client, and what no client may see."""

from __future__ import annotations

import socket

SECRET = b"not for anybody"


def ask(port: int, request: bytes, timeout: float = 10) -> bytes:
    """What the server answers to raw bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer
