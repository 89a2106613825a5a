"""The lock against real processes; files on a full disk, which a limit on file size stands for."""

import contextlib
import fcntl
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm import files
from lm.errors import ConfigError, StorageError
from lm.files import AppendOnlyFile, write_atomically
from lm.train.run_directory import RunDirectory, is_held, is_run

HOLDER = """
import sys
import threading
from lm.train.run_directory import RunDirectory
with RunDirectory(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_entering_makes_the_folders_and_the_locations_are_known_before(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "a")
    assert not (tmp_path / "runs").exists()
    with run:
        made = {path.name for path in (tmp_path / "runs" / "a").iterdir()}
        assert made == {"checkpoints", "tensorboard", ".lock"}
    files = (run.config, run.checkpoints, run.tensorboard, run.metrics, run.log)
    assert [file.name for file in files] == [
        "config.json",
        "checkpoints",
        "tensorboard",
        "metrics.jsonl",
        "log.txt",
    ]
    assert all(file.parent == run.path for file in files)


def test_a_second_process_is_refused_by_name_and_makes_nothing(tmp_path: Path) -> None:
    with holder(tmp_path / "a") as process:
        for folder in ("checkpoints", "tensorboard"):
            (tmp_path / "a" / folder).rmdir()
        lock = (tmp_path / "a" / ".lock").read_bytes()
        refused = RunDirectory(tmp_path / "a")
        with pytest.raises(ConfigError) as error, refused:
            pass
        assert re.search(
            rf"in use by process {process.pid} on .+, started \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait",
            str(error.value),
        )
        assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]
        assert (tmp_path / "a" / ".lock").read_bytes() == lock


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    with holder(tmp_path / "a") as process:
        process.kill()
        process.wait()
        with RunDirectory(tmp_path / "a"):
            pass


def test_one_process_cannot_take_the_lock_twice_but_again(tmp_path: Path) -> None:
    with RunDirectory(tmp_path), pytest.raises(ConfigError), RunDirectory(tmp_path):
        pass
    with RunDirectory(tmp_path):
        pass


@pytest.mark.parametrize("inside", ["", "/under/it"])
def test_a_file_in_the_place_of_the_directory(tmp_path: Path, inside: str) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match=r"notes\.txt.* is a file.*choose another run\.dir"):
        RunDirectory(f"{tmp_path}/notes.txt{inside}").__enter__()
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_a_run_is_a_directory_with_a_config(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "a") as run:
        assert not is_run(run.path)
        write_atomically(run.config, b"{}")
        assert is_run(tmp_path / "a")
    assert not is_run(tmp_path / "nowhere")


def test_an_atomic_write_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "config.json"
    write_atomically(target, b"old")
    with file_size_limit(1000), pytest.raises(StorageError, match=r"cannot write .*config\.json: File too"):
        write_atomically(target, b"x" * 2000)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    write_atomically(str(target), b"new")
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_record_that_does_not_fit_leaves_nothing_and_is_told_once(tmp_path: Path) -> None:
    reports: list[str] = []
    file = AppendOnlyFile(tmp_path / "log.txt", reports.append)
    file.append(b"first\n")
    with file_size_limit(100):
        file.append(b"x" * 200 + b"\n")
        file.append(b"y" * 200 + b"\n")
        file.append(b"short\n")
    file.append(b"last\n")
    file.close()
    assert (tmp_path / "log.txt").read_bytes() == b"first\nshort\nlast\n"
    assert len(reports) == 1
    assert "log.txt: File too large; the run goes on" in reports[0]


def test_a_last_line_is_replaced_or_stays_and_what_is_appended_follows_it(tmp_path: Path) -> None:
    reports: list[str] = []
    path = tmp_path / "log.txt"
    file = AppendOnlyFile(path, reports.append)
    file.replace_last(lambda line: line + b"one\n")
    file.append(b"two\n")
    file.replace_last(lambda line: line.upper())
    file.append(b"three\n")
    assert path.read_bytes() == b"one\nTWO\nthree\n"
    assert not reports
    with file_size_limit(100):
        file.replace_last(lambda _: b"x" * 200)
    assert path.read_bytes() == b"one\nTWO\nthree\n"
    assert reports == [f"cannot write {path}: File too large; the run goes on, what cannot be written is missing there"]
    file.append(b"four\n")
    file.close()
    assert path.read_bytes() == b"one\nTWO\nthree\nfour\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_that_is_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(b"one\ntwo\n")
    seen = []

    def killed(source: Path, _: Path) -> None:
        seen.append((path.read_bytes(), Path(source).read_bytes(), "tfevents" in Path(source).name))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        AppendOnlyFile(path, pytest.fail).replace_last(lambda _: b"2\n")
    assert seen == [(b"one\ntwo\n", b"one\n2\n", False)]
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_file_that_cannot_be_opened_is_told_once(tmp_path: Path) -> None:
    reports: list[str] = []
    file = AppendOnlyFile(tmp_path / "missing" / "log.txt", reports.append)
    file.append(b"lost\n")
    file.append(b"lost\n")
    (tmp_path / "missing").mkdir()
    file.append(b"kept\n")
    file.close()
    assert (tmp_path / "missing" / "log.txt").read_bytes() == b"kept\n"
    assert len(reports) == 1
    assert "No such file or directory" in reports[0]


def bucket_file(path: Path, reports: list[str], monkeypatch: pytest.MonkeyPatch) -> AppendOnlyFile:
    """A local path that is treated as a bucket: always written whole."""
    monkeypatch.setattr(files, "is_url", lambda _: True)
    return AppendOnlyFile(path, reports.append)


def test_in_a_bucket_the_file_is_written_whole_now_and_then_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log.txt").write_bytes(b"one\ntwo\n")
    file = bucket_file(tmp_path / "log.txt", [], monkeypatch)
    file.truncate(4)
    file.append(b"2\n")
    assert (tmp_path / "log.txt").read_bytes() == b"one\ntwo\n"
    file.close()
    assert (tmp_path / "log.txt").read_bytes() == b"one\n2\n"

    monkeypatch.setattr(files, "UPLOAD_SECONDS", 0.01)
    file.append(b"3\n")
    file.replace_last(lambda line: line * 2)
    deadline = time.monotonic() + 30
    while (tmp_path / "log.txt").read_bytes() != b"one\n2\n3\n3\n":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    file.close()


def test_a_failed_upload_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reports: list[str] = []
    file = bucket_file(tmp_path / "missing" / "log.txt", reports, monkeypatch)
    file.append(b"one\n")
    file.close()
    assert len(reports) == 1
    (tmp_path / "missing").mkdir()
    file.close()
    assert (tmp_path / "missing" / "log.txt").read_bytes() == b"one\n"
    file.append(b"two\n")
    file.close()
    assert len(reports) == 1
    assert (tmp_path / "missing" / "log.txt").read_bytes() == b"one\ntwo\n"


def test_whether_it_is_held(tmp_path: Path) -> None:
    assert is_held(tmp_path / "none") is False
    with RunDirectory(tmp_path / "run"):
        assert is_held(tmp_path / "run") is True
    assert is_held(tmp_path / "run") is False
    assert is_held("gs://bucket/run") is None


def test_whoever_looks_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    with RunDirectory(tmp_path):
        pass
    with open(tmp_path / ".lock") as looks:
        fcntl.flock(looks, fcntl.LOCK_SH)  # as `is_held`, but for longer
        assert is_held(tmp_path) is False
        threading.Timer(0.1, lambda: fcntl.flock(looks, fcntl.LOCK_UN)).start()
        with RunDirectory(tmp_path):
            assert is_held(tmp_path) is True
