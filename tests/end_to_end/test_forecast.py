"""Every run says what was predicted of it beside what is measured, and goes on where nothing can be predicted."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm.cli import main
from lm.plan import expected
from lm.train.forecast import Expected

LINE = r"predicted (\S+ m?s) a step and (\S+ [kM]B), measured \S+ m?s \([+-]\d+%\) and \S+ [kM]B \([+-]\d+%\)"
COMMAND = ["train", "tiny.py", "--eval.every=0", "--checkpoint.every=0"]


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_predicted_and_measured(undisturbed: Path) -> None:
    lines = lines_of(undisturbed)
    for line in lines:
        assert line["expected_step_seconds"] == lines[0]["expected_step_seconds"] > 0
        assert line["expected_memory_bytes"] == lines[0]["expected_memory_bytes"] > 0
        assert line["memory_bytes"] > 0
    log = (undisturbed / "log.txt").read_text()
    assert len(re.findall(LINE, log)) == 2
    assert log.rindex("predicted") > log.index("step 12/12") > log.index("predicted")


def test_what_is_logged_is_what_was_predicted(
    in_workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(expected, "expect", lambda config, mesh: Expected(0.25, 3_000_000))
    assert main([*COMMAND, "--train.steps=5", "--log.every=2", "--run.dir=foretold"]) == 0
    lines = lines_of(in_workplace / "foretold")
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert {(line["expected_step_seconds"], line["expected_memory_bytes"]) for line in lines} == {(0.25, 3_000_000)}
    found = re.findall(LINE, capsys.readouterr().out)
    assert found == [("0.25 s", "3.00 MB")] * 2
    board = EventAccumulator(str(in_workplace / "foretold" / "tensorboard"))
    board.Reload()
    shown = {
        "4 speed/expected_step_seconds": 0.25,
        "5 whole/expected_memory_bytes": 3e6,
        "1 overview/8 whole: memory_bytes": lines[0]["memory_bytes"],
    }
    for tag, value in shown.items():
        assert [event.value for event in board.Scalars(tag)] == [value] * 3


def test_a_prediction_that_fails_is_said_once_and_ends_nothing(
    in_workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: Any, mesh: Any) -> None:
        raise ZeroDivisionError("no chips")

    monkeypatch.setattr(expected, "expect", fail)
    assert main([*COMMAND, "--train.steps=3", "--run.dir=unforetold"]) == 0
    said = "step time and memory could not be predicted: ZeroDivisionError: no chips"
    out = capsys.readouterr().out
    assert out.count(said) == 1
    assert "measured" not in out
    assert (in_workplace / "unforetold" / "log.txt").read_text().count(said) == 1
    for line in lines_of(in_workplace / "unforetold"):
        assert line["memory_bytes"] > 0
        assert not line.keys() & {"expected_step_seconds", "expected_memory_bytes"}
