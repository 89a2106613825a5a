"""Servers on this machine: one that answers as Weights & Biases does, and ones that are of no use."""

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Wandb:
    """What a service holds: of each run its rows, config and how it ended. It forgets what comes after `full` rows."""

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, dict[str, Any]] = {}
        self.full: int | None = None
        self.begun: list[str] = []

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        words = re.search(r"(?:query|mutation) (\w+)", query)
        answer = getattr(self, f"_{words[1]}", None) if words else None
        return answer(variables) if answer else {}

    def stream(self, run: str, sent: dict[str, Any]) -> None:
        kept = self.runs[run]
        if history := sent.get("files", {}).get("wandb-history.jsonl"):
            rows = kept["rows"]
            rows[history["offset"] :] = [json.loads(row) for row in history["content"]]
            if self.full is not None:
                del rows[self.full :]
        kept |= {name: sent[name] for name in ("complete", "exitcode", "preempting") if name in sent}

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "V", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        kept = self.runs.get(variables["name"])
        bucket = kept and {
            "id": "B",
            "name": variables["name"],
            "summaryMetrics": "{}",
            "displayName": kept["displayName"],
            "logLineCount": 0,
            "historyLineCount": len(kept["rows"]),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in kept["rows"][-1:]]),
            "eventsTail": "[]",
            "config": kept["config"],
            "tags": [],
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "M", "name": "lm", "entity": {"id": "E", "name": "me"}, "bucket": bucket}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name, new = variables["name"], variables["name"] not in self.runs
        kept = self.runs.setdefault(name, {"rows": [], "config": "{}", "displayName": variables["displayName"]})
        kept |= {key: variables[key] for key in ("config", "host", "commit", "project") if variables.get(key)}
        if variables.get("displayName"):  # once in each life
            self.begun.append(name)
        bucket = {
            "id": "B",
            "name": name,
            "displayName": kept["displayName"],
            "description": "",
            "config": kept["config"],
            "sweepName": None,
            "historyLineCount": len(kept["rows"]),
            "project": {"id": "P", "name": variables["project"], "entity": {"id": "E", "name": "me"}},
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}

    def _Run(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"run": {"id": "B", "projectId": "1", "name": variables["name"], "state": "running"}}}

    def _RunHistoryKeys(self, variables: dict[str, Any]) -> dict[str, Any]:
        rows = self.runs[variables["name"]]["rows"]
        return {"project": {"run": {"historyKeys": {"lastStep": rows[-1]["_step"] if rows else -1}}}}


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on this machine."""
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None: ...  # clients that hang up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def body(self) -> bytes:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(sent) if self.headers.get("Content-Encoding") == "gzip" else sent

    def answer(self, body: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextlib.contextmanager
def wandb_server() -> Iterator[Wandb]:
    service = Wandb()

    class Answers(Handler):
        def do_POST(self) -> None:
            sent = self.body()
            if self.path == "/graphql":
                asked = json.loads(sent)
                self.answer({"data": service.graphql(asked["query"], asked.get("variables") or {})})
                return
            if self.path.endswith("/file_stream"):
                service.stream(self.path.split("/")[4], json.loads(sent))
            self.answer({})

        def do_PUT(self) -> None:
            self.body()
            self.answer({})

        do_GET = do_PUT

    with serving(Answers) as service.url:
        yield service


@contextlib.contextmanager
def refusing(status: int) -> Iterator[str]:
    """A server that answers everything with this status."""

    class Refuses(Handler):
        def do_POST(self) -> None:
            self.body()
            self.answer({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "over quota", "errors": []}, status)

        do_GET = do_PUT = do_POST

    with serving(Refuses) as url:
        yield url


@contextlib.contextmanager
def hanging() -> Iterator[str]:
    """A server that takes everything and never answers."""
    closed = threading.Event()

    class Hangs(Handler):
        def do_POST(self) -> None:
            closed.wait()

        do_GET = do_PUT = do_POST

    with serving(Hangs) as url:
        yield url
        closed.set()
