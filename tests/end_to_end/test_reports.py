"""`lm status`, `lm runs` and `lm plot` of real runs: one that goes on, one that was killed, one that is done."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Lm


@pytest.fixture(scope="module")
def going_on(workplace: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`lm train` with steps for hours, in the folder `going_on`; ended with the tests."""
    options = ["--train.steps=10000000", "--checkpoint.every=200", "--eval.every=100", "--data.dir=undisturbed/data"]
    command = [sys.executable, "-m", "lm", "train", "tiny.py", "--run.dir=going_on", *options]
    with open(workplace / "going_on.txt", "wb") as output:
        process = subprocess.Popen(command, cwd=workplace, stdout=output, stderr=subprocess.STDOUT)
    yield process
    process.kill()
    process.wait()


def until(lm: Lm, run: str, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """What `lm status --json` says when it says what is wanted."""
    end = time.monotonic() + 240
    while True:
        found: dict[str, Any] = json.loads(lm("status", run, "--json").stdout)
        if wanted(found):
            return found
        assert time.monotonic() < end, found


def test_a_run_that_goes_on_and_then_is_killed(
    undisturbed: Path, going_on: subprocess.Popen[bytes], workplace: Path, lm: Lm
) -> None:
    while not (workplace / "going_on" / "journal.jsonl").exists():
        assert going_on.poll() is None
        time.sleep(0.05)
    began = until(lm, "going_on", lambda found: found["doing"])
    assert began | {"state": "running", "pid": going_on.pid, "restarts": 0, "steps": began["steps"]} == began
    found = until(lm, "going_on", lambda found: found["checkpoint"] and found["doing"] == "step")
    assert found["step"] >= 200
    assert found["checkpoint"]["step"] % 200 == 0
    assert found["heldout_step"] % 100 == 0
    assert found["warnings"] == []
    assert found["seconds_left"] > 60
    assert found["tokens_per_second"] > 0
    text = lm("status", "going_on").stdout
    assert text.startswith("going_on: running")
    assert re.search(r"^  step +[\d,]+ of 10,000,000 \(0%\), .* tokens, .* left$", text, re.M)
    assert re.search(rf"^  process +{going_on.pid} on .*, 1 x cpu, started .* UTC, last heard of ", text, re.M)
    assert "* going_on  last " in lm("plot", "going_on", "--smooth=5").stdout

    os.kill(going_on.pid, signal.SIGKILL)
    going_on.wait()
    killed = json.loads(lm("status", "going_on", "--json").stdout)
    assert killed | {"state": "killed", "doing": None, "exit_code": None, "seconds_left": None} == killed
    assert killed["step"] >= found["step"]
    assert lm("status", "going_on").stdout.startswith("going_on: killed: its process is gone")


def test_runs_that_have_ended(undisturbed: Path, stopped: Path, lm: Lm) -> None:
    assert lm("status", "undisturbed").stdout.startswith("undisturbed: done, ")
    assert lm("status", "stopped").stdout.startswith("stopped: stopped, ")
    found = json.loads(lm("status", "stopped", "--json").stdout)
    assert found | {"exit_code": 75, "step": 8, "steps": 12, "warnings": []} == found
    assert found["checkpoint"]["step"] == 8


def test_side_by_side(undisturbed: Path, stopped: Path, lm: Lm) -> None:
    rows = json.loads(lm("runs", "undisturbed", "stopped", "--sort", "step", "--json").stdout)
    assert [(row["run"], row["state"], row["step"]) for row in rows] == [
        ("stopped", "stopped", 8),
        ("undisturbed", "done", 12),
    ]
    assert all(row["config"] == {} for row in rows)
    assert "undisturbed" in lm("runs", ".").stdout


def test_curves(undisturbed: Path, stopped: Path, lm: Lm) -> None:
    drawn = lm("plot", "undisturbed", "stopped", "--metric=loss", "--metric=heldout_loss", "--x=tokens").stdout
    assert drawn.isascii()
    assert re.search(r"^d stopped heldout_loss  last ", drawn, re.M)
    assert "did you mean 'heldout_loss'" in lm("plot", "undisturbed", "--metric=held_loss", code=2).stderr
