"""What goes over the line between the processes of a run."""

import contextlib
import ipaddress
import json
import os
import socket
import sys
import threading
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

    @property
    def bind(self) -> str:
        """host:port for process 0 to listen at: only processes of this host reach an address that only they can use."""
        host, _, port = self.address.rpartition(":")
        with contextlib.suppress(ValueError):
            if host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback:
                return self.address
        return f"[::]:{port}"


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


def keep_alive(sock: socket.socket, seconds: float) -> None:
    """A host that loses power or its network says nothing: after so many seconds it counts as gone.

    The kernel asks and answers: a process that is stopped or busy is not gone.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    part = max(1, round(seconds / 4))
    settings = {"TCP_KEEPIDLE": part, "TCP_KEEPINTVL": part, "TCP_KEEPCNT": 3}
    settings["TCP_USER_TIMEOUT"] = round(1000 * seconds)  # for what was sent and not confirmed
    for name, value in settings.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def exit_after(seconds: float, code: int) -> None:
    """Ends the process then, whatever it still tries: what is written to a pipe or a disk may wait for ever."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon, timer.name = True, "exit"
    timer.start()
