"""Real file systems that are full, read-only, failing or slow: the run goes on, and loses nothing but saves."""

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lm.checkpoint.checkpoints import list_checkpoints

from ..end_to_end.conftest import Lm, Logged
from .conftest import Disk, FaultyDisk, Run


def digests(run: Path) -> dict[int, str]:
    return {info.step: info.digest for info in list_checkpoints(run / "checkpoints") if info.problem is None}


def test_full(small_disk: Disk, stopped: Path, undisturbed: Path, workplace: Path, logged: Logged, lm: Lm) -> None:
    run = Path(shutil.copytree(stopped, small_disk.path / "run"))
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace('"dir": "stopped"', f'"dir": "{run}"'))  # as it would be there
    filler = small_disk.path / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    said = Run(workplace, run).wait(code=5)
    assert "checkpoints/9 was not saved: No space left on device; the run goes on, the last good one is 8" in said
    assert "cannot write" in said
    assert "lm: all 12 steps are done, but the last state could not be saved" in said
    assert "Traceback" not in said
    assert max(digests(run)) == 8
    filler.unlink()
    ended = lm("train", run)
    assert "goes on from checkpoint 8\n" in ended.stdout
    assert digests(run)[12] == digests(undisturbed)[12]
    assert logged(run) == logged(undisturbed)


def test_read_only(small_disk: Disk, stopped: Path, workplace: Path, undisturbed: Path) -> None:
    run = Path(shutil.copytree(stopped, small_disk.path / "run"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk.path], check=True)
    said = Run(workplace, run).wait(code=5)
    assert said == f"lm: cannot write the run directory {run}: Read-only file system\n"
    subprocess.run(["mount", "-o", "remount,rw", small_disk.path], check=True)
    Run(workplace, run).wait(code=0)
    assert digests(run)[12] == digests(undisturbed)[12]


def test_errors_while_it_is_written(
    faulty_disk: FaultyDisk, undisturbed: Path, workplace: Path, logged: Logged
) -> None:
    """From the second save on for a while, as when a disk turns read-only."""
    changes = ["write", "create", "fsync", "rename", "mkdir", "truncate"]
    faulty_disk.rules(
        {"on": ["write"], "below": "run/checkpoints/3/state", "fails": "EIO", "after": 3},
        {"on": ["fsync"], "below": "run/checkpoints/6", "fails": "EIO"},
        {"on": changes, "below": "run/checkpoints/9", "fails": "EROFS"},
        {"on": ["write"], "below": "run/log.txt", "fails": "EIO", "after": 4},
    )
    run = faulty_disk.path / "run"
    said = Run(workplace, run).wait(code=0)
    assert "checkpoints/3 was not saved: Input/output error; the run goes on, there is no older one" in said
    assert "checkpoints/6 was not saved: Input/output error; the run goes on, there is no older one" in said
    assert "checkpoints/9 was not saved: Read-only file system; the run goes on" in said
    assert "never retrieved" not in said
    assert f"cannot write {run}/log.txt: Input/output error; the run goes on" in said
    assert digests(run) == {12: digests(undisturbed)[12]}
    assert logged(run) == logged(undisturbed)


def test_errors_while_it_is_read(
    faulty_disk: FaultyDisk, stopped: Path, undisturbed: Path, workplace: Path, logged: Logged
) -> None:
    """A checkpoint that cannot be read is not used, but may be later; then the data cannot be: exit code 3."""
    shutil.copytree(stopped, faulty_disk.folder / "run")
    run = faulty_disk.path / "run"
    faulty_disk.rules(
        {"on": ["read"], "below": "run/checkpoints/8/state", "fails": "EIO"},
        {"on": ["open", "read"], "below": "run/data/train", "fails": "ENOENT"},
    )
    said = Run(workplace, run, "--data.stall_seconds=2").wait(code=3)
    assert re.search(r"checkpoints/8 is not used: state/.* cannot be read: .*; it stays where it is", said)
    assert f"lm: {run}/data" in said
    faulty_disk.rules()
    said = Run(workplace, run).wait(code=0)
    assert "goes on from checkpoint 8\n" in said
    assert digests(run)[12] == digests(undisturbed)[12]
    assert logged(run) == logged(undisturbed)


@pytest.mark.slow
def test_slow(faulty_disk: FaultyDisk, undisturbed: Path, workplace: Path, logged: Logged) -> None:
    faulty_disk.rules({"on": ["fsync", "rename"], "below": "run/checkpoints", "seconds": 0.5})
    run = faulty_disk.path / "run"
    said = Run(workplace, run, "--checkpoint.patience_seconds=0", "--checkpoint.every=1").wait(code=0)
    assert "is not saved: the save of step 1 is still going" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["saves_skipped"] > 0
    assert lines[-1]["saves_failed"] == 0
    assert digests(run)[12] == digests(undisturbed)[12]
    assert logged(run) == logged(undisturbed)
