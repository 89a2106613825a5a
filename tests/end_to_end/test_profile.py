"""`lm profile`: traces of real runs, taken by config and on demand, and what is said when there is none."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.errors import StorageError
from lm.profile import now, xplane
from lm.train import profile_request
from lm.train.run_directory import RunDirectory

from .conftest import Lm, Logged

LONG = ("--train.steps", "100000", "--eval.every", "0", "--checkpoint.every", "0")


def folder(run: Path) -> Path:
    return run / "tensorboard" / "plugins" / "profile"


@pytest.fixture(scope="module")
def traced(lm: Lm, workplace: Path) -> Path:
    """A finished run, of which steps 6 to 8 were traced. Not to be changed."""
    ended = lm("train", "tiny.py", "--run.dir", "traced", "--profile.steps", "6:9")
    assert "profile: traces steps 6 to 8" in ended.stdout
    assert "`lm profile traced`" in ended.stdout
    assert ended.stderr == ""
    return workplace / "traced"


def test_a_trace(lm: Lm, traced: Path) -> None:
    printed = lm("profile", "traced").stdout
    (name,) = [one.name for one in folder(traced).iterdir()]
    assert printed.startswith(f"trace {name}: steps 6 to 8, on 1 x cpu\nstep ")
    assert "predicted" in printed.splitlines()[1]
    for words in ("matrix products", "elementwise", "attention", "feed-forward", "optimizer and checks", "what to try"):
        assert words in printed
    found = json.loads(lm("profile", "traced", "--json", "--trace", name).stdout)
    assert found["summary"]["runs"] == 3
    parts = {row["name"]: row["seconds"] for row in found["summary"]["parts"]}
    kinds = {row["name"]: row["seconds"] for row in found["summary"]["kinds"]}
    assert sum(parts.values()) == pytest.approx(sum(kinds.values()))
    times = {row["name"]: row["times"] for row in found["summary"]["parts"]}
    assert times["rest of the step"] < 0.5 * sum(times.values())  # of so short ones, seconds are chance
    assert any(row["source"].startswith("lm/model/") for row in found["summary"]["operations"])


def test_what_a_trace_changes(traced: Path, undisturbed: Path, logged: Logged) -> None:
    """Nothing: the run has the same losses. What it took is no training time."""
    assert logged(traced) == logged(undisturbed)
    events = [json.loads(line) for line in (traced / "journal.jsonl").read_text().splitlines()]
    assert events[-1]["milliseconds"]["profile"] > 0


def test_reading_a_trace_touches_no_device(lm: Lm, traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are here may be taken, by the very run."""
    monkeypatch.setenv("JAX_PLATFORMS", "of no machine")
    assert "what to try" in lm("profile", "traced").stdout


def test_what_cannot_be_read(lm: Lm, undisturbed: Path, traced: Path, workplace: Path, tmp_path: Path) -> None:
    assert "never-made is not a run" in lm("profile", "never-made", code=2).stderr
    none = lm("profile", "undisturbed", code=2).stderr
    assert "undisturbed has no trace: `lm profile undisturbed --now`" in none
    assert "has no trace 'x'; there are 20" in lm("profile", "traced", "--trace", "x", code=2).stderr
    assert "--steps is for --now" in lm("profile", "traced", "--steps", "3", code=2).stderr
    assert "give one of them" in lm("profile", "traced", "--now", "--trace", "x", code=2).stderr

    (file,) = folder(traced).glob("*/*.xplane.pb")
    run = tmp_path / "run"
    made = folder(run) / "2026_01_01_00_00_00"
    made.mkdir(parents=True)
    (run / "config.json").write_bytes((traced / "config.json").read_bytes())
    copy = made / "host.xplane.pb"
    whole = file.read_bytes()
    for damaged, said in (
        (whole[: len(whole) // 2], "is damaged"),
        (bytes([255]) * 1000, "is damaged"),
        (b"", "holds nothing"),
        (idle(), "no operation of any device"),
    ):
        copy.write_bytes(damaged)
        assert said in lm("profile", run, code=5).stderr
    copy.write_bytes(whole)
    assert lm("profile", run).stdout.startswith("trace 2026_01_01_00_00_00: steps 6 to 8")
    (run / "config.json").write_text("{}")  # as of a version that has other keys
    assert "matrix products" in lm("profile", run).stdout


def idle() -> bytes:
    space = xplane.message_type("XSpace")()
    space.planes.add(name="/host:CPU")  # type: ignore[attr-defined]
    return space.SerializeToString()


def test_a_run_that_is_not_going_on(lm: Lm, undisturbed: Path) -> None:
    said = lm("profile", "undisturbed", "--now", code=2).stderr
    assert "undisturbed is not going on, so no step can be traced now" in said
    assert "--steps must be from 1 to 100" in lm("profile", "undisturbed", "--now", "--steps", "0", code=2).stderr
    assert not (undisturbed / "profile").exists()


@pytest.mark.parametrize("processes", [1, 2])
def test_now(lm: Lm, workplace: Path, processes: int) -> None:
    run = workplace / f"now{processes}"
    train = ["train", "tiny.py", "--run.dir", run.name, *LONG]
    launch = ["-m", "lm"] if processes == 1 else ["-m", "launch.local", "--processes", "2", "--"]
    log = (workplace / f"{run.name}.out").open("w")
    job = subprocess.Popen([sys.executable, *launch, *train], cwd=workplace, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists():
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        ended = lm("profile", run.name, "--now", "--steps", "3", "--json")
        assert ended.stderr.startswith("lm: asked for 3 steps; Ctrl-C stops waiting\n")
        found = json.loads(ended.stdout)
        assert len(found["summary"]["steps"]) == found["summary"]["runs"] == 3
        assert found["devices"] == processes
        assert len(list(folder(run).iterdir())) == 1
        (run / "profile").touch()  # by hand: the usual number of steps
        while len(list(folder(run).glob("*/*.xplane.pb"))) < 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert len(json.loads(lm("profile", run.name, "--json").stdout)["summary"]["steps"]) == 5
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(120)
    assert job.returncode == 75, (workplace / f"{run.name}.out").read_text()


def test_ctrl_c_takes_the_request_back(lm: Lm, undisturbed: Path, workplace: Path) -> None:
    """The run has its lock, and takes nothing; another who asks meanwhile is sent away."""
    run = RunDirectory(workplace / "held")
    with run:
        (workplace / "held" / "config.json").write_bytes((undisturbed / "config.json").read_bytes())
        waiting = subprocess.Popen(
            [sys.executable, "-m", "lm", "profile", "held", "--now", "--steps", "100"],
            cwd=workplace,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == "lm: asked for 100 steps; Ctrl-C stops waiting\n"
        request = (workplace / "held" / "profile").read_text()
        assert "a trace is asked for already: held/profile" in lm("profile", "held", "--now", code=2).stderr
        assert (workplace / "held" / "profile").read_text() == request
        waiting.send_signal(signal.SIGINT)
        said = waiting.communicate(timeout=60)[1]
    assert said.startswith("lm: stopped waiting; if the run has taken the request, ")
    assert waiting.returncode == 130
    assert not (workplace / "held" / "profile").exists()


def test_a_run_that_does_not_react(lm: Lm, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is stopped: it has the lock, and takes nothing."""
    monkeypatch.setattr(profile_request, "LOCAL_SECONDS", 0.02)
    run = RunDirectory(workplace / "silent")
    with run:
        assert now.is_going_on(run)
        with pytest.raises(StorageError, match="does not take the request: for 1 s it did not begin its steps"):
            now.take(run)
    assert not now.is_going_on(run)
    assert not os.path.exists(run.path / "profile")
