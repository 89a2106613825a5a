"""Sources at URLs: what is listed and read, and what happens when a server is slow, or fails."""

import gzip
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lm.data import plan, remote
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.sources import content_hash, cut, documents, list_files, present, whole
from lm.errors import DataError

TEXTS = [f"{i} é" * (i % 30 + 1) for i in range(400)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


class Server(ThreadingHTTPServer):
    """Gives files with ranges, and indexes of folders. `before` is called with each request, and may fail it."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.before: Callable[[BaseHTTPRequestHandler], bool] = lambda request: True
        self.requests: list[tuple[str, str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        asked = self.headers.get("Range", "")
        self.server.requests.append((self.command, self.path, asked))
        if not self.server.before(self):
            return
        path = self.path.partition("?")[0]
        content, status, headers = self.server.files.get(path), 200, {"Accept-Ranges": "bytes"}
        if self.path.endswith("/"):
            inside = {path.removeprefix(self.path).partition("/") for path in self.server.files if self.path in path}
            names = sorted({name + slash for name, slash, _ in inside})
            content = "".join(f'<a href="{name}">{name}</a>' for name in ["../", "?C=N;O=D", *names]).encode()
            headers = {"Content-Type": "text/html"}
        elif content is None:
            kind = "Repo" if path.count("/") < 5 else "Revision" if "/revision/" in path else "Entry"  # of the hub
            return self.send(404, b"", {"X-Error-Code": f"{kind}NotFound"})
        elif asked:
            start, _, stop = asked.removeprefix("bytes=").partition("-")
            headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
            content, status = content[int(start) : int(stop) + 1], 206
        self.send(status, content, headers)

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    server = Server(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving({"/data/a.jsonl": LINES, "/data/deep/b.jsonl.gz": gzip.compress(LINES), "/data/.hidden": b""}) as it:
        yield it


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    files = fsspec.filesystem("memory")
    files.store.clear()  # of what other tests left there
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.05, 0.1))
    monkeypatch.setattr(remote, "READ_SECONDS", 1.5)
    monkeypatch.setattr(remote, "LIST_SECONDS", 1.5)


def texts(*paths: str, limit: int | None = None) -> list[str]:
    pieces = [p for file in list_files(paths) for p in (cut(file, limit) if limit else [whole(file)])]
    return [d.text for piece in pieces for d in documents(piece, "text", Counter())]


def names(*paths: str) -> list[str]:
    return [file.name for file in list_files(paths)]


def test_listing_of_a_file_system_that_is_no_bucket(memory: fsspec.AbstractFileSystem) -> None:
    for name in ("a/1.txt", "a/b/2.txt", "a/b/.hidden/3.txt", "a/b/.4.txt", "a/c/5.jsonl", "d/6.txt"):
        memory.pipe_file(f"/x/{name}", b"text")
    everything = [f"memory://x/{name}" for name in ("a/1.txt", "a/b/2.txt", "a/c/5.jsonl", "d/6.txt")]
    assert names("memory://x") == names("memory://x/") == names("memory://x", everything[1]) == everything
    assert names("memory://x/a/b/2.txt") == [everything[1]]
    assert names("memory://x/*/*.txt") == [everything[0], everything[3]]
    assert names("memory://x/**/*.txt") == [everything[i] for i in (0, 1, 3)]
    assert names("memory://x/**") == names("memory://*/**") == everything
    assert names("memory://x/a/[bc]/?.*") == everything[1:3]
    assert [f.heldout for f in list_files(["memory://x"], ["memory://x/d"])] == [False, False, False, True]
    assert present("memory://x")
    assert not present("memory://y")
    with pytest.raises(DataError, match="memory://y: no such file or folder"):
        names("memory://y")
    with pytest.raises(DataError, match=r"memory://x/\*\.bin: no files there"):
        names("memory://x/*.bin")
    with pytest.raises(DataError, match="nosuch://x: cannot be reached: ValueError: Protocol not known: nosuch"):
        names("nosuch://x")


@pytest.mark.parametrize(("url", "package", "extra"), [
    ("gs://bucket/x", "gcsfs", "gcs"), ("s3://bucket/x", "s3fs", "s3"),
    ("https://host/x", "aiohttp", "http"), ("hf://datasets/a/b", "huggingface_hub", "hub"),
])  # fmt: skip
def test_what_must_be_installed_is_named(url: str, package: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from lm.data.sources import list_files; list_files([{url!r}])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = ended.stderr.strip().splitlines()[-1]
    assert message.startswith("lm.errors.DataError: " + url)
    assert package in message
    assert message.endswith(f": pip install 'lm[{extra}]'")


def test_a_modified_file_is_seen(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/x/a.txt", b"text")
    (before,) = list_files(["memory://x"])
    memory.pipe_file("/x/a.txt", b"TEXT")
    (after,) = list_files(["memory://x"])
    assert before.size == after.size
    assert before.modified != after.modified


def write_all(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    rows = [{"text": text} for text in TEXTS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet", row_group_size=50)
    with (
        pa.OSFile(str(folder / "d.arrow"), "wb") as file,
        pa.ipc.new_stream(file, pa.schema({"text": pa.string()})) as w,
    ):
        w.write_table(pa.Table.from_pylist(rows), max_chunksize=50)
    records = ArrayRecordWriter(str(folder / "e.array_record"), "group_size:1")
    for text in TEXTS:
        records.write(text.encode())
    records.close()


@pytest.mark.parametrize("scheme", ["memory", "http"])
def test_every_format_is_read_as_if_it_were_here(
    tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "copies"))
    (tmp_path / "copies").mkdir()
    folder = tmp_path / "here"
    folder.mkdir()
    write_all(folder)
    contents = {f"/x/{file.name}": file.read_bytes() for file in folder.iterdir()}
    for path, content in contents.items():
        memory.pipe_file(path, content)
    with serving(contents) as server:
        there = "memory://x" if scheme == "memory" else f"{server.url}/x/"
        for near, far in zip(list_files([str(folder)]), list_files([there]), strict=True):
            assert far.name == f"{there.rstrip('/')}/{Path(near.name).name}"
            assert far.size == near.size
            for limit in (1 << 30, 3000):
                pieces = cut(far, limit)
                assert [d.text for p in pieces for d in documents(p, "text", Counter())] == TEXTS
            if not far.name.endswith(".arrow"):  # of which a remote one is not cut
                assert len(pieces) > 1 or far.name.endswith(".gz")
                assert [content_hash(p) for p in pieces] == [content_hash(p) for p in cut(near, 3000)]


def test_only_the_piece_is_asked_for(server: Server) -> None:
    server.files["/data/big.jsonl"] = LINES * 1000
    (file,) = list_files([f"{server.url}/data/big.jsonl"])
    pieces = cut(file, file.size // 8)
    server.requests.clear()
    found = list(documents(pieces[5], "text", Counter()))
    asked = [r.removeprefix("bytes=").split("-") for _, _, r in server.requests if r]
    assert len(found) > 10_000
    assert min(int(first) for first, _ in asked) >= pieces[5].start
    assert sum(int(last) - int(first) + 1 for first, last in asked if last) < 2 * file.size // 8 + (4 << 20)


def test_web_folders_and_globs(server: Server) -> None:
    a, b = f"{server.url}/data/a.jsonl", f"{server.url}/data/deep/b.jsonl.gz"
    assert names(f"{server.url}/data/") == [a, b]
    assert names(a) == [a]
    assert names(f"{server.url}/data/*.jsonl") == [a]
    assert texts(f"{server.url}/data/") == TEXTS * 2
    with pytest.raises(DataError, match=r"/data/c\.jsonl: no such file or folder"):
        names(f"{server.url}/data/c.jsonl")


def failing(times: int, how: Callable[[BaseHTTPRequestHandler], None], where: str = "GET") -> Callable[..., bool]:
    left = iter(range(times))

    def before(request: BaseHTTPRequestHandler) -> bool:
        if request.command == where and next(left, None) is not None:
            how(request)
            return False
        return True

    return before


def busy(request: BaseHTTPRequestHandler) -> None:
    request.send(503, b"busy", {})


def too_many(request: BaseHTTPRequestHandler) -> None:
    request.send(429, b"", {})


def hang_up(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    request.connection.close()


def half(request: BaseHTTPRequestHandler) -> None:
    request.wfile.write(b"HTTP/1.1 206 OK\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/1000\r\n\r\nhalf")
    hang_up(request)


def stall(request: BaseHTTPRequestHandler) -> None:
    time.sleep(2)
    hang_up(request)


@pytest.mark.parametrize("how", [busy, too_many, hang_up, half, stall])
def test_what_passes_is_tried_again(
    server: Server, quick: None, caplog: pytest.LogCaptureFixture, how: Callable[[BaseHTTPRequestHandler], None]
) -> None:
    url = f"{server.url}/data/a.jsonl"
    (file,) = list_files([url])
    server.before = failing(2, how)
    with caplog.at_level(logging.WARNING):
        assert [d.text for d in documents(whole(file), "text", Counter())] == TEXTS
    lines = [record.getMessage() for record in caplog.records if record.name == "lm.data.remote"]
    assert lines
    assert all(line.startswith(f"{url}: reading at byte 0 failed: ") for line in lines)
    assert lines[0].endswith("trying again in 0.05 s")


@pytest.mark.parametrize("how", [busy, hang_up, half, stall])
def test_what_does_not_pass_ends(server: Server, quick: None, how: Callable[[BaseHTTPRequestHandler], None]) -> None:
    url = f"{server.url}/data/a.jsonl"
    (file,) = list_files([url])
    server.before = failing(10**6, how)
    started = time.monotonic()
    with pytest.raises(DataError, match=rf"{url}: reading at byte 0 failed 3 times, at last with: \w+"):
        list(documents(whole(file), "text", Counter()))
    with pytest.raises(DataError, match=rf"{server.url}/data/: listing it failed 3 times"):
        list_files([f"{server.url}/data/"])
    assert time.monotonic() - started < 2 * 3 * 1.5 + 8


def test_in_the_middle_of_a_file(server: Server, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read already is neither lost nor doubled."""
    monkeypatch.setattr(remote, "_MOST", 5000)
    (file,) = list_files([f"{server.url}/data/a.jsonl"])
    count = iter(range(10**6))

    def every_third(request: BaseHTTPRequestHandler) -> bool:
        if next(count) % 3 == 2:
            half(request)
            return False
        return True

    server.before = every_third
    assert [d.text for d in documents(whole(file), "text", Counter())] == TEXTS


def test_listing_is_tried_again_too(server: Server, quick: None, caplog: pytest.LogCaptureFixture) -> None:
    server.before = failing(1, stall)
    assert len(list_files([f"{server.url}/data/"])) == 2
    server.before = failing(10**6, busy, "HEAD")
    # Where the short question fails, fsspec asks for the file and looks at the header alone.
    assert len(list_files([f"{server.url}/data/a.jsonl"])) == 1


def test_what_cannot_pass_is_not_tried_again(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    (file,) = list_files([f"{server.url}/data/a.jsonl"])
    server.before = failing(10**6, lambda request: request.send(403, b"", {}))
    with pytest.raises(DataError, match=r"a\.jsonl: reading at byte 0 failed: .*403"):
        list(documents(whole(file), "text", Counter()))
    server.before = lambda request: True
    del server.files["/data/a.jsonl"]
    with pytest.raises(DataError, match=r"a\.jsonl: gone"):
        list(documents(whole(file), "text", Counter()))
    assert not caplog.records


def test_what_libraries_of_buckets_say_of_missing_ones(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ClientError(Exception):
        """As botocore has it."""

        response: ClassVar = {"ResponseMetadata": {"HTTPStatusCode": 404}}

    def info(*_: object) -> dict[str, object]:
        raise ClientError("NoSuchBucket")

    monkeypatch.setattr(type(memory), "info", info)
    with pytest.raises(DataError, match="memory://x: no such file or folder"):
        names("memory://x")
    ClientError.response["ResponseMetadata"]["HTTPStatusCode"] = 403
    with pytest.raises(DataError, match="memory://x: looking for it failed: ClientError: NoSuchBucket"):
        names("memory://x")


def test_parquet_and_array_records_of_a_failing_server(tmp_path: Path, server: Server, quick: None) -> None:
    write_all(tmp_path)
    for name in ("c.parquet", "d.arrow", "e.array_record"):
        server.files[f"/{name}"] = (tmp_path / name).read_bytes()
        server.before = lambda request: True
        (file,) = list_files([f"{server.url}/{name}"])
        server.before = failing(10**6, hang_up)
        with pytest.raises(DataError, match=rf"{name}: reading at byte \d+ failed 3 times"):
            list(documents(whole(file), "text", Counter()))


def test_a_handle_that_never_answered_is_not_used_again(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """The thread that waits for it may still move it."""
    handles: list[io.BytesIO] = []
    late = threading.Event()

    class Handle(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if len(handles) == 1:
                late.wait()
            return super().read(size)

    def opened(*_: object, **__: object) -> io.BytesIO:
        handles.append(Handle(LINES))
        return handles[-1]

    memory.pipe_file("/x/a.jsonl", LINES)
    monkeypatch.setattr(type(memory), "open", opened)
    assert texts("memory://x") == TEXTS
    assert len(handles) == 2
    late.set()


def test_a_server_that_gives_files_only_whole(server: Server, quick: None) -> None:
    server.files["/big.jsonl"] = LINES * 30  # more than arrives at once

    def whole_files(request: BaseHTTPRequestHandler) -> bool:
        request.send(200, server.files[request.path], {"Accept-Ranges": "none"})
        return False

    server.before = whole_files
    assert texts(f"{server.url}/big.jsonl") == TEXTS * 30
    with pytest.raises(DataError, match=r"big\.jsonl: reading at byte \d+ failed: ValueError: .*[Ss]eek"):
        texts(f"{server.url}/big.jsonl", limit=1 << 20)


def test_a_server_without_lengths(server: Server, quick: None) -> None:
    def chunked(request: BaseHTTPRequestHandler) -> bool:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(b"4\r\ntext\r\n0\r\n\r\n")
        return False

    server.before = chunked
    with pytest.raises(DataError, match=r"x\.txt: its server does not say how long it is; download it"):
        list_files([f"{server.url}/x.txt"])


def test_build_from_urls_and_from_here_are_the_same(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, memory: fsspec.AbstractFileSystem
) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 5000)
    (tmp_path / "a.jsonl").write_bytes(LINES)
    here = DataConfig((str(tmp_path / "a.jsonl"),), tokenizer=TokenizerConfig("bytes"), workers=1)
    there = replace(here, paths=(f"{server.url}/data/a.jsonl",))
    built = build(here, tmp_path / "here", print)
    assert len(built.splits["train"]) > 2
    assert build(replace(there, workers=2), tmp_path / "there", print).fingerprint == built.fingerprint


def test_tokens_at_a_url(tmp_path: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    memory.pipe_file("/x/train.bin", np.array([1, 2, 257, 3], "<u2").tobytes())
    index = b"MMIDIDX\0\0" + b"\1" + bytes(7) + b"\x08" + np.array([1, 2], "<u8").tobytes()
    index += np.array([4], "<i4").tobytes() + np.array([0, 0, 1], "<i8").tobytes()
    memory.pipe_file("/x/train.idx", index)
    config = DataConfig(("memory://x",), tokenizer=TokenizerConfig("bytes"), holdout_fraction=0.0, workers=1)
    flat = build(replace(config, tokens="uint16"), tmp_path / "flat", print)
    indexed = build(replace(config, tokens="megatron"), tmp_path / "indexed", print)
    assert (flat.documents("train"), flat.tokens("train")) == (2, 7)
    assert (indexed.documents("train"), indexed.tokens("train")) == (1, 6)


def hub(files: dict[str, bytes], revision: str = "main") -> dict[str, bytes]:
    """What the Hugging Face hub answers for a dataset ours/texts with these files."""
    api = f"/api/datasets/ours/texts/tree/{revision}"
    answers = {
        "/api/datasets/ours/texts": b'{"id": "ours/texts"}',
        f"/api/datasets/ours/texts/revision/{revision}": b'{"id": "ours/texts"}',
    }
    folders = {"", *(str(parent) for name in files for parent in Path(name).parents if str(parent) != ".")}
    for folder in folders:
        inside: list[dict[str, object]] = [
            {"type": "directory", "path": other, "oid": "0"}
            for other in sorted(folders)
            if other and str(Path(other).parent).replace(".", "") == folder
        ]
        for name, content in files.items():
            if str(Path(name).parent).replace(".", "") == folder:
                oid = hashlib.sha1(content).hexdigest()
                inside.append({"type": "file", "path": name, "oid": oid, "size": len(content)})
        answers[f"{api}/{folder}".rstrip("/")] = json.dumps(inside).encode()
    return answers | {f"/datasets/ours/texts/resolve/{revision}/{name}": raw for name, raw in files.items()}


HUB = "hf://datasets/ours/texts"


def hub_files(tmp_path: Path) -> dict[str, bytes]:
    write_all(tmp_path)
    return {
        "README.md": b"# Texts",
        ".gitattributes": b"",
        "data/train-00000-of-00002.parquet": (tmp_path / "c.parquet").read_bytes(),
        "data/train-00001-of-00002.parquet": (tmp_path / "c.parquet").read_bytes(),
        "data/test.jsonl": LINES,
    }


def test_datasets_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = hub_files(tmp_path)
    with serving(hub(files) | hub({"x.jsonl": LINES}, "v2")) as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
        train = [f"{HUB}/data/train-0000{i}-of-00002.parquet" for i in range(2)]
        assert names(HUB) == names(f"{HUB}/data") == [f"{HUB}/data/test.jsonl", *train]
        assert names(f"{HUB}/data/train-*") == names(f"{HUB}/**/*.parquet") == train
        assert names(f"{HUB}@v2") == [f"{HUB}@v2/x.jsonl"]
        assert texts(*train, limit=3000) == TEXTS * 2
        assert texts(f"{HUB}/data/test.jsonl", limit=3000) == texts(f"{HUB}@v2") == TEXTS
        modified = {file.modified for file in list_files([HUB])}
        assert len(modified) == 2  # by content: the two Parquet files are the same
        for missing in (f"{HUB}/nowhere", "hf://datasets/ours/nothing", f"{HUB}@v3", "hf://ours/texts"):
            with pytest.raises(DataError, match=rf"{missing}: no such file or folder; a dataset is hf://datasets/NAME"):
                names(missing)
    with serving(hub({"README.md": b"", "data.csv": b""})) as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
        with pytest.raises(DataError, match="no data files there"):
            names(HUB)


def test_the_hub_at_its_real_switch(tmp_path: Path) -> None:
    """In a process of its own: the library looks at the variable when it is imported."""
    code = (
        "from collections import Counter; from lm.data.sources import *;"
        f"print(sum(1 for f in list_files(['{HUB}']) for d in documents(whole(f), 'text', Counter())))"
    )
    with serving(hub(hub_files(tmp_path))) as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ended.stdout == f"{3 * len(TEXTS)}\n", ended.stderr
    assert ended.stderr == ""


def test_no_network_to_the_hub(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    with serving({}) as server:
        url = server.url
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url})
    with pytest.raises(DataError, match=rf"{HUB}: looking for it failed 3 times, at last with: ConnectError"):
        names(HUB)
