"""Disks that are full, cannot be written, or fail; and the tiny run of the end-to-end tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ..end_to_end.conftest import lm as lm
from ..end_to_end.conftest import logged as logged
from ..end_to_end.conftest import stopped as stopped
from ..end_to_end.conftest import template as template
from ..end_to_end.conftest import template_stopped as template_stopped
from ..end_to_end.conftest import template_undisturbed as template_undisturbed
from ..end_to_end.conftest import undisturbed as undisturbed
from ..end_to_end.conftest import workplace as workplace

FAULTY_DISK = Path(__file__).parent / "faulty_disk.py"


class Disk:
    """A file system of its own at `path`."""

    def __init__(self, path: Path):
        path.mkdir()
        self.path = path
        self.mounted = False

    def mount(self, *arguments: str) -> None:
        ended = subprocess.run(["mount", *arguments, self.path], capture_output=True, text=True)
        if ended.returncode:
            pytest.skip(f"mounting is not allowed here: {ended.stderr.strip()}")
        self.mounted = True

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", self.path], check=True)
        self.mounted = False


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Disk]:
    """4 MB of memory."""
    disk = Disk(tmp_path / "small")
    disk.mount("-t", "tmpfs", "-o", "size=4m", "none")
    yield disk
    disk.unmount()


class FaultyDisk(Disk):
    """Shows `folder`, by the rules of faulty_disk.py."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.folder, self._rules = path.with_name("behind"), path.with_name("rules.json")
        self.folder.mkdir()
        self.rules()
        self._server = subprocess.Popen([sys.executable, FAULTY_DISK, self.folder, path, self._rules])
        until = time.monotonic() + 60
        while not os.path.ismount(path):
            assert self._server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        self.mounted = True

    def rules(self, *rules: Mapping[str, Any]) -> None:
        new = self._rules.with_suffix(".new")
        new.write_text(json.dumps(rules))
        os.replace(new, self._rules)

    def unmount(self) -> None:
        super().unmount()
        self._server.kill()
        self._server.wait()


@pytest.fixture
def faulty_disk(tmp_path: Path) -> Iterator[FaultyDisk]:
    pytest.importorskip("mfusepy", reason="needs the package mfusepy", exc_type=(ImportError, OSError))
    if not os.access("/dev/fuse", os.W_OK) or os.geteuid():
        pytest.skip("needs /dev/fuse, and the right to mount")
    disk = FaultyDisk(tmp_path / "faulty")
    yield disk
    disk.unmount()


class Run:
    """`lm train` in the background."""

    def __init__(self, workplace: Path, run: Path, *options: str, program: Sequence[str] = ("-m", "lm")):
        self.path = run
        self.process = subprocess.Popen(
            [sys.executable, *program, "train", "tiny.py", f"--run.dir={run}", *options],
            cwd=workplace,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, code: int) -> str:
        """What it said."""
        try:
            said, _ = self.process.communicate(timeout=240)
        finally:
            self.process.kill()
        assert self.process.returncode == code, said
        return said
