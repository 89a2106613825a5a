"""Runs whose built data cannot be read, or only after a while: they go on, or end with exit code 3."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import STALLS, Lm, Logged


def train(workplace: Path, run: str, happens: str, *, code: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", STALLS, "train", "tiny.py", "--run.dir", run, "--data.stall_seconds=2"]
    ended = subprocess.run(
        command, cwd=workplace, env=os.environ | {"HAPPENS": happens}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended


def test_a_read_that_fails_once_is_said_and_changes_nothing(workplace: Path, undisturbed: Path, logged: Logged) -> None:
    ended = train(workplace, "failed_once", "fails once", code=0)
    line = "source web: shard 7: record 3 cannot be read: no route to host; trying again in 0.1 s\n"
    assert ended.stdout.count(line) == 1
    assert ended.stderr == ""
    assert (workplace / "failed_once" / "log.txt").read_text().count(line) == 1
    assert logged(workplace / "failed_once") == logged(undisturbed)


@pytest.mark.parametrize("happens", ["fails", "hangs"])
def test_a_source_that_fails_or_hangs_ends_the_run(
    workplace: Path, undisturbed: Path, lm: Lm, logged: Logged, happens: str
) -> None:
    ended = train(workplace, happens, happens, code=3)
    (line,) = ended.stderr.splitlines()
    if happens == "fails":
        assert line == "lm: source web: shard 7: record 3 cannot be read: no route to host"
        assert ended.stdout.count("trying again in ") == 2
    else:
        assert line.startswith("lm: batch 7: no answer for ")
        said = r"batch 7: not there after \d+ s: no answer for \d+ s from source web: shard 7: record 3\n"
        assert re.search(said, ended.stdout)
        assert re.search(said, (workplace / happens / "log.txt").read_text())
    lm("train", happens)
    assert logged(workplace / happens) == logged(undisturbed)


def test_a_file_that_hangs_from_the_start_ends_the_run(workplace: Path, lm: Lm) -> None:
    command = ("tiny.py", "--run.dir", "hung", "--data.packing=best_fit")
    lm("data", "build", *command)
    for path in (workplace / "hung" / "data").glob("train-*.lengths"):
        path.unlink()
        os.mkfifo(path)
    began = time.monotonic()
    for workers in (0, 1):
        ended = lm("train", *command, "--data.stall_seconds=2", f"--data.loader_workers={workers}", code=3)
        assert ".lengths, which is more than data.stall_seconds" in ended.stderr
    assert time.monotonic() - began < 120


def test_a_run_with_workers_is_the_same(workplace: Path, undisturbed: Path, lm: Lm, logged: Logged) -> None:
    ended = lm("train", "tiny.py", "--run.dir", "with_workers", "--data.loader_workers=2")
    assert ended.stderr == ""
    assert logged(workplace / "with_workers") == logged(undisturbed)
