"""What goes over the line between the processes of a run."""

import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MAGIC = b"lm-1"
_LARGEST = 2**30


@dataclass(frozen=True)
class Place:
    """Which process of how many this one is, and where process 0 listens."""

    address: str
    """host:port of process 0"""
    count: int
    index: int
    hosts: tuple[str, ...] = ()
    """Of the processes, in order, where the cluster tells."""
    local_devices: tuple[int, ...] | None = None
    """Those of this host that are for this process, where the cluster tells; None: all."""


class Frames:
    """Cuts what comes over a connection into messages. Raises ValueError for what no process of a run sends."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[Any]:
        self._buffer += chunk
        messages = []
        while len(self._buffer) >= 8:
            size = int.from_bytes(self._buffer[4:8], "big")
            if self._buffer[:4] != _MAGIC or size > _LARGEST:
                raise ValueError("not a message of a run")
            if len(self._buffer) < 8 + size:
                break
            messages.append(json.loads(self._buffer[8 : 8 + size]))
            del self._buffer[: 8 + size]
        return messages


def frame(message: Any) -> bytes:
    body = json.dumps(message).encode()
    return _MAGIC + len(body).to_bytes(4, "big") + body


def each(sock: socket.socket) -> Iterator[Any]:
    frames = Frames()
    while chunk := sock.recv(2**20):
        yield from frames.feed(chunk)


def keep_alive(sock: socket.socket) -> None:
    """A host that loses power says nothing: after a minute it counts as gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 60_000)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
