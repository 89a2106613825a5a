"""now.json while a run goes on, when it ends, and when it cannot be written."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from lm.train import now as module
from lm.train.now import Now, read_now


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.02)


def until(path: Path, doing: str) -> dict[str, Any]:
    end = time.monotonic() + 30
    while (facts := read_now(path)) is None or facts["doing"] != doing:
        assert time.monotonic() < end, facts
        time.sleep(0.005)
    return facts


def test_it_says_what_is_under_way_and_is_gone_at_the_end(tmp_path: Path) -> None:
    path, doing = tmp_path / "now.json", ("compile", 0)
    with Now(path, start="abc", look=lambda: doing):
        first = until(path, "compile")
        assert first | {"start": "abc", "pid": os.getpid(), "done": 0, "every": 0.02} == first
        doing = "step", 7
        second = until(path, "step")
        assert second["done"] == 7
        assert first["since"] < second["since"] <= second["time"] <= time.time()
        while (third := read_now(path)) is None or third["time"] == second["time"]:
            time.sleep(0.005)
        assert third["since"] == second["since"]
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    with Now(tmp_path / "missing" / "now.json", start="abc", look=lambda: ("step", 1)):
        time.sleep(0.1)
    with Now(None, start="abc", look=lambda: ("step", 1)):
        pass
    assert list(tmp_path.iterdir()) == []


def test_storage_that_hangs_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, free = threading.Event(), threading.Event()

    def write(*_: object) -> None:
        hangs.set()
        free.wait()

    monkeypatch.setattr(module.Now, "_write", write)
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)
    with Now(tmp_path / "now.json", start="abc", look=lambda: ("step", 1)):
        assert hangs.wait(30)
    free.set()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"start": 1})])
def test_what_is_no_such_file_says_nothing(tmp_path: Path, text: str) -> None:
    assert read_now(tmp_path / "now.json") is None
    (tmp_path / "now.json").write_text(text)
    assert read_now(tmp_path / "now.json") is None
