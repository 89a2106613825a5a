"""A bucket that answers 503, or nothing, cuts uploads off, or is away.

It is that of gcp-storage-emulator, behind a server that fails requests by rules, and that keeps the conditions of
requests (ifGenerationMatch), which the emulator does not know and tensorstore relies on.
"""

import contextlib
import http.client
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

from gcp_storage_emulator.server import create_server

from launch.local import free_port

NAME = "bucket"

Answer = tuple[int, Mapping[str, str], bytes]


@dataclass
class Rule:
    """Of requests with this method that have `part` in their path."""

    does: int | Literal["hang", "cut"]
    """The status that is answered; or that nothing is; or that the connection ends in the middle of the body."""
    part: str = ""
    method: str = ""
    """Empty: any."""
    times: float = math.inf
    """So many requests; all others pass."""
    until: float = math.inf
    """By time.monotonic()."""
    met: int = 0
    """Requests that it has failed."""

    def takes(self, request: BaseHTTPRequestHandler) -> bool:
        fits = self.method in ("", request.command) and self.part in unquote(request.path)
        if not fits or self.met >= self.times or time.monotonic() > self.until:
            return False
        self.met += 1
        return True


class FaultyBucket:
    """gs://bucket for libraries that are told `variables`."""

    def __init__(self) -> None:
        emulator = free_port()
        self._emulator = create_server("127.0.0.1", emulator, in_memory=True, default_bucket=NAME)
        self._emulator.start()
        self._address = ("127.0.0.1", free_port(), emulator)
        self._rules: list[Rule] = []
        self._come()

    @property
    def variables(self) -> Mapping[str, str]:
        url = f"http://127.0.0.1:{self._address[1]}"
        return {
            "STORAGE_EMULATOR_HOST": url,  # of gcsfs
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "FSSPEC_GCS": json.dumps({"token": "anon", "requests_timeout": 2.0}),  # nobody is asked for another token
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
            "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "1",
        }

    @contextlib.contextmanager
    def failing(
        self,
        does: int | Literal["hang", "cut"],
        part: str = "",
        method: str = "",
        *,
        times: float = math.inf,
        seconds: float = math.inf,
    ) -> Iterator[Rule]:
        """Inside, a rule holds. Requests that hang do so until then."""
        rule = Rule(does, part, method, times, time.monotonic() + seconds)
        self._rules.append(rule)
        try:
            yield rule
        finally:
            self._rules.remove(rule)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Inside, nobody listens."""
        self._go()
        try:
            yield
        finally:
            self._come()

    def close(self) -> None:
        self._rules.clear()
        self._go()
        self._emulator.stop()

    def _come(self) -> None:
        self._server = _Server(self._address, self._rules)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _go(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # for requests that hang

    def __init__(self, address: tuple[str, int, int], rules: list[Rule]):
        super().__init__(address[:2], _Handler)
        self.emulator, self.rules = address[2], rules
        self.mutex = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0, as the emulator: a connection for each request."""

    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def handle_any(self) -> None:
        with self.server.mutex:
            rule = next((rule for rule in self.server.rules if rule.takes(self)), None)
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2)
        if rule is not None and rule.does == "cut":
            now = struct.pack("ii", 1, 0)  # an error for who is still writing, not an end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            self.connection.close()
            return
        body += self.rfile.read(length - len(body))
        if rule is not None and rule.does == "hang":
            while rule in self.server.rules:
                time.sleep(0.05)
        elif rule is not None:
            self.answer(int(rule.does), {"Content-Type": "text/plain"}, b"by a rule of the test")
        else:
            self.answer(*self.asked(body))

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

    def asked(self, body: bytes) -> Answer:
        """What the emulator answers, and what it leaves out."""
        asked = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(asked.query).items()}
        name = query.get("name") or unquote(asked.path.partition("/o/")[2])
        with self.server.mutex:
            generation = self.generation(name)
            if query.get("ifGenerationMatch", generation) != generation:
                return 412, {}, b""
            if query.get("ifGenerationNotMatch", "0") == generation != "0":
                return 304, {}, b""
            status, headers, content = self.emulated(self.command, self.path, body, dict(self.headers))
            return status, {**headers, "x-goog-generation": generation}, content

    def generation(self, name: str) -> str:
        """Of the object; "0" where there is none."""
        status, _, content = self.emulated("GET", f"/storage/v1/b/{NAME}/o/{quote(name, safe='')}", b"", {})
        return json.loads(content)["generation"] if name and status == 200 else "0"

    def emulated(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.emulator, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
