"""What is said of a run in each state that it can be found in, from what its files hold."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lm.cli import main
from lm.errors import ConfigError, StorageError
from lm.report.facts import read_facts
from lm.report.status import status, status_lines
from lm.train.run_directory import RunDirectory

from .made import CONFIG, begun, doing, event, line, made


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)


def found(path: Path) -> dict[str, Any]:
    """What is known, which programs must be able to read."""
    return dict(json.loads(json.dumps(status(read_facts(path)), allow_nan=False)))


def shown(path: Path) -> Iterator[tuple[str, str]]:
    """The lines for people, by what they begin with."""
    first, *rest = status_lines(read_facts(path))
    yield "state", first.removeprefix(f"{path}: ")
    for row in rest:
        name, text = row.split(maxsplit=1)
        yield name, text


def test_one_that_runs_on_another_machine(tmp_path: Path) -> None:
    spent = {"step": 40_000, "input": 10_000, "evaluation": 25_000}
    events = [begun(host="elsewhere"), event("accounts", ago=30, done=30, saved=20, milliseconds=spent)]
    lines = [line(k, loss=5.0 - k / 100, mfu=0.4) for k in range(39)] + [line(39, heldout_loss=4.8)]
    run = made(tmp_path / "run", events=events, lines=lines, now=doing("step", 41))
    facts = found(run)
    assert facts | {"state": "running", "doing": "step", "step": 41, "steps": 100, "mfu": 0.4} == facts
    assert facts | {"heldout_step": 40, "heldout_loss": 4.8, "heldout_bits_per_byte": None, "restarts": 0} == facts
    assert facts["seconds_left"] == pytest.approx(59 * 0.5 * 1.5)  # half a second between steps for each in them
    assert facts["warnings"] == []
    rows = dict(shown(run))
    assert rows["state"] == "running, training"
    assert rows["step"] == "41 of 100 (41%), 40.0k tokens, 44s left"
    assert rows["loss"] == "5.0000, 2.5000 bits per byte, held-out 4.8000 (step 40)"
    assert rows["speed"] == "2.00k tokens/s, 0.5 s a step, MFU 40.0%"
    assert rows["checkpoint"] == "none yet"
    assert rows["goodput"].startswith("54% of 1m15s: evaluation 33%")
    assert "on elsewhere, 8 x TPU v5p, in 2 processes, started " in rows["process"]
    assert rows["process"].endswith("last heard of 1.0s ago")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("compile", "compiling for 4.0s"),
        ("evaluation", "evaluating for 4.0s"),
        ("save", "saving for 4.0s"),
        ("restore", "restoring for 4.0s"),
        ("data", "building data for 4.0s"),
        ("new", "new for 4.0s"),
    ],
)
def test_what_it_does_besides_steps(tmp_path: Path, what: str, words: str) -> None:
    run = made(tmp_path / "run", events=[begun(host="elsewhere")], now=doing(what, 3, since=5, ago=1))
    assert dict(shown(run))["state"] == f"running, {words}"


def test_a_run_whose_lock_is_held(tmp_path: Path) -> None:
    """Whatever else there is: no journal yet, one of a start before, an old sign of life."""
    for number, (events, state) in enumerate(
        [
            ([], "running"),
            ([begun()], "running"),
            ([begun(), event("end", code=3, reason="DataError: x")], "running"),
        ]
    ):
        run = made(tmp_path / str(number), events=events, now=doing("save", 3, start="b", ago=4000))
        with RunDirectory(run):
            assert found(run)["state"] == state
    assert found(run)["state"] == "failed"


def test_killed_here_is_known_at_once(tmp_path: Path) -> None:
    run = made(tmp_path / "run", events=[begun()], lines=[line(0)], now=doing("save", 1, ago=0))
    assert found(run)["state"] == "killed"
    assert found(run)["doing"] is None
    assert dict(shown(run))["state"].startswith("killed: its process is gone, and could not say why; last heard of ")


@pytest.mark.parametrize(("every", "ago", "state"), [(5, 50, "running"), (5, 70, "silent"), (30, 140, "running")])
def test_elsewhere_a_run_is_silent_when_nothing_is_heard_of_it(
    tmp_path: Path, every: float, ago: float, state: str
) -> None:
    now = doing("step", 1, ago=ago, since=ago, every=every)
    run = made(tmp_path / "run", events=[begun(host="elsewhere", ago=500)], now=now)
    assert found(run)["state"] == state
    if state == "silent":
        assert "from this machine its process cannot be seen" in dict(shown(run))["state"]


@pytest.mark.parametrize(
    ("code", "reason", "text"),
    [
        (0, None, "done, 2m00s ago: all steps are done"),
        (75, "Stopped: stopped by SIGTERM", "stopped, 2m00s ago: it was asked to stop, and saved; it can go on"),
        (3, "DataError: no such file", "failed with exit code 3, 2m00s ago: DataError: no such file"),
        (1, None, "failed with exit code 1, 2m00s ago: no reason is known"),
    ],
)
def test_how_it_ended(tmp_path: Path, code: int, reason: str | None, text: str) -> None:
    end = event("end", ago=120, code=code, done=7, **({"reason": reason} if reason else {}))
    run = made(tmp_path / "run", events=[begun(), end])
    assert dict(shown(run))["state"] == text
    assert found(run) | {"exit_code": code, "reason": reason, "step": 7, "seconds_left": None} == found(run)


def test_a_supervisor_starts_it_again_or_does_not(tmp_path: Path) -> None:
    def said(then: str, ago: float) -> dict[str, Any]:
        note = event("supervisor", ago=ago, of="a", code=137, then=then)
        return {name: note[name] for name in ("event", "time", "of", "code", "then")}

    again, no_more = "starts again in 4.0s", "does not start again: --restarts 1"
    for number, (note, state) in enumerate(
        [(said(again, 3), "restarting"), (said(again, 3600), "killed"), (said(no_more, 3), "killed")]
    ):
        run = made(tmp_path / str(number), events=[begun(host="elsewhere"), note])
        assert found(run)["state"] == state
        assert found(run)["exit_code"] == 137
    assert dict(shown(tmp_path / "0"))["state"].endswith("its supervisor starts again in 4.0s")


def test_restarts(tmp_path: Path) -> None:
    events = [
        begun("a", ago=900),
        event("accounts", start="a", ago=800, done=40, milliseconds={"step": 100_000}),
        begun("b", ago=700),
        event("end", start="b", ago=600, done=60, code=3, reason="DataError: gone", milliseconds={"step": 100_000}),
        begun("c", ago=500, host="elsewhere"),
    ]
    run = made(tmp_path / "run", events=events, now=doing("compile", 60, start="c"))
    assert found(run)["restarts"] == 2
    assert dict(shown(run))["restarts"] == "2, the last after it ended with exit code 3 at step 60: DataError: gone"
    assert found(made(tmp_path / "killed", events=[*events[:2], events[4]]))["restarts"] == 1
    assert dict(shown(tmp_path / "killed"))["restarts"] == "1, the last after it killed at step 40"


def test_warnings(tmp_path: Path) -> None:
    last = line(9, loss="NaN", grad_norm="Infinity", skipped_steps=3.0, saves_failed=1)
    now = doing("step", 10, since=700, ago=2)
    run = made(tmp_path / "run", events=[begun(host="elsewhere", ago=900)], lines=[last], now=now)
    assert found(run)["warnings"] == [
        "in step 9, loss is nan, grad_norm is inf",
        "3 steps were not applied: loss or gradient were not finite, or a spike",
        "1 saves of this start have failed",
        "no progress for 11m40s, while training after step 10",
    ]
    assert found(run)["loss"] == "NaN"
    assert dict(shown(run))["loss"].startswith("nan, ")


def test_slow_steps_and_long_evaluations_are_no_reason_to_warn(tmp_path: Path) -> None:
    for name, now, lines in (
        ("slow", doing("step", 1, since=700), [line(0, step_seconds=100.0)]),
        ("evaluation", doing("evaluation", 1, since=700), [line(0)]),
        ("data", doing("data", 0, since=70_000), []),
    ):
        run = made(tmp_path / name, events=[begun(host="elsewhere", ago=80_000)], lines=lines, now=now)
        assert found(run)["warnings"] == []


def test_a_process_that_is_stopped_is_not_heard_of(tmp_path: Path) -> None:
    run = made(tmp_path / "run", events=[begun()], now=doing("step", 1, ago=600, since=600))
    with RunDirectory(run):
        assert found(run)["state"] == "running"
        assert "nothing heard of it for 10m00s: it is stopped" in found(run)["warnings"][0]


def test_what_is_damaged_or_missing(tmp_path: Path) -> None:
    torn = json.dumps(line(0)) + "\n" + json.dumps(line(1))[:30]
    run = made(tmp_path / "run", config='{"run', lines=torn, events='{"event": "start", "sta', now="{")
    facts = found(run)
    assert facts | {"state": "unknown", "step": 1, "steps": None, "goodput": None, "checkpoint": None} == facts
    assert "config.json cannot be read" in facts["warnings"][0]
    assert dict(shown(run))["state"] == "unknown: it has no journal"
    run = made(tmp_path / "new", lines=None, events=None)
    assert found(run) | {"state": "unknown", "step": 0, "loss": None, "tokens_per_second": None} == found(run)
    assert dict(shown(run)).keys() == {"state", "step", "checkpoint"}
    run = made(tmp_path / "building", config=None, events=[begun(host="elsewhere")], now=doing("data", 0))
    assert dict(shown(run))["step"] == "0"
    run = made(tmp_path / "list", config="[1]")
    assert found(run)["warnings"] == ["config.json holds no config"]


def test_bad_checkpoints_do_not_count(tmp_path: Path) -> None:
    run = made(tmp_path / "run", events=[begun(host="elsewhere")], now=doing("step", 5))
    folder = run / "checkpoints" / "4"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert found(run)["checkpoint"] is None
    assert found(run)["warnings"] == ["checkpoint 4 is bad: manifest.json is not as it was written"]


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="is not a run, it has no config"):
            read_facts(path)
        assert main(["status", str(path)]) == 2
        assert capsys.readouterr().err == f"lm: {path} is not a run, it has no config.json\n"


def test_a_journal_that_cannot_be_read(tmp_path: Path) -> None:
    (made(tmp_path / "run") / "journal.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"journal\.jsonl"):
        read_facts(tmp_path / "run")


def test_what_is_printed_cannot_drive_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [begun(host="\x1b[2Jx"), event("end", code=3, reason="DataError: \x1b]0;x\x07\r")]
    run = made(tmp_path / "a\x1b[1m\nb", config=CONFIG, events=events, lines=[line(0, **{"\x9b": "NaN"})])
    assert main(["status", str(run)]) == 0
    printed = capsys.readouterr().out
    assert not set(printed) & {"\x1b", "\x07", "\r", "\x9b"}
    assert len(printed.splitlines()) == 7
