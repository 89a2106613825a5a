"""What was logged, read back as programs and TensorBoard read it, also after a real SIGKILL and a resume."""

import json
import math
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from lm.errors import StorageError
from lm.experiment import Config, RunConfig
from lm.train.run_directory import RunDirectory
from lm.train.summaries import Summaries, verbatim


def start(path: Path, first_step: int = 0, reports: list[str] | None = None) -> Summaries:
    run = RunDirectory(path)
    run.tensorboard.mkdir(parents=True, exist_ok=True)

    def report(message: str) -> None:
        if reports is None:
            pytest.fail(message)
        reports.append(message)

    return Summaries(run, first_step=first_step, report=report)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def dashboard(path: Path) -> EventAccumulator:
    return EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def points(path: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in dashboard(path).Scalars(tag)]


def test_numbers_read_back_exactly(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "loss": np.float32(0.1),
        "learning_rate": 1 / 3,
        "grad_norm": np.float32(1.1754944e-38),
        "tokens": 2**53 + 1,
        "mfu": 5e-324,
    }
    log = start(tmp_path)
    log.scalars(1, values)
    log.close()
    [line] = lines(tmp_path)
    assert list(line) == ["step", *values]
    assert struct.pack("f", line["loss"]) == struct.pack("f", values["loss"])
    assert line["loss"] == float(values["loss"]) != 0.1
    assert {name: line[name] for name in ("learning_rate", "tokens", "mfu", "grad_norm")} == {
        name: values[name] for name in ("learning_rate", "tokens", "mfu", "grad_norm")
    }


def test_numbers_that_are_not_finite_are_valid_json_and_shown(tmp_path: Path) -> None:
    log = start(tmp_path)
    minus: Any = np.float32(-math.inf)
    log.scalars(1, {"loss": math.nan, "grad_norm": math.inf, "param_norm": minus})
    log.close()

    def no_constants(name: str) -> float:
        pytest.fail(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=no_constants)
    assert line == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "param_norm": "-Infinity"}
    assert math.isnan(float(line["loss"]))
    assert float(line["param_norm"]) == -math.inf
    assert math.isnan(points(tmp_path, "1 overview/1 learning: loss")[0][1])
    assert points(tmp_path, "1 overview/2 healthy: grad_norm") == [(1, math.inf)]


def test_tensorboard_has_a_section_for_each_kind(tmp_path: Path) -> None:
    log = start(tmp_path)
    log.scalars(5, {"loss": 1, "grad_norm": 2, "grad_norm/embedding": 3, "mfu": 4, "probe": 5, "heldout_loss/books": 6})
    log.text(5, "samples/greedy", verbatim("a *b*\n\n<c> \udce9"))
    log.config(Config(run=RunConfig(seed=1)), "0123456789ab")
    log.close()
    board = dashboard(tmp_path)
    assert set(board.Tags()["scalars"]) == {
        "1 overview/1 learning: loss",
        "1 overview/2 healthy: grad_norm",
        "1 overview/7 fast: mfu",
        "6 by layer/grad_norm/embedding",
        "7 by source/heldout_loss/books",
        "8 other/probe",
    }

    def text(tag: str) -> str:
        [event] = board.Tensors(tag)
        return tensor_util.make_ndarray(event.tensor_proto).item().decode()

    assert text("samples/greedy") == "    a *b*\n    \n    <c> ?"
    assert text("config").startswith('    {\n      "run": {\n        "dir": "runs/run",\n        "seed": 1\n')
    assert board.SummaryMetadata("config").plugin_data.plugin_name == "text"


def test_a_step_is_logged_once_and_in_order(tmp_path: Path) -> None:
    log = start(tmp_path, first_step=4)
    with pytest.raises(ValueError, match="step 3 is logged already: the next can be 4"):
        log.scalars(3, {"loss": 1.0})
    log.scalars(7, {"loss": 1.0})
    with pytest.raises(ValueError, match="step 7"):
        log.scalars(7, {"heldout_loss": 1.0})
    log.close()
    assert [line["step"] for line in lines(tmp_path)] == [7]


ENDLESS = """
import itertools, sys
from lm.experiment import Config, RunConfig
from lm.train.run_directory import RunDirectory
from lm.train.summaries import Summaries
with RunDirectory(sys.argv[1]) as run:
    log = Summaries(run, first_step=0, report=sys.exit)
    log.config(Config(run=RunConfig(dir="first start")), "0123456789ab")
    for step in itertools.count(1):
        log.scalars(step, {"loss": step + 0.5, "tokens": 100 * step, "note_" + "x" * 500: 1.0})
"""


def test_a_run_that_was_killed_and_resumed_has_every_step_once(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)])
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 60:
        assert process.poll() is None
        assert time.monotonic() < deadline
    process.kill()
    process.wait()

    assert metrics.read_bytes().endswith(b"}\n")
    killed = [line["step"] for line in lines(tmp_path)]
    assert killed == list(range(1, len(killed) + 1))
    shown = [step for step, _ in points(tmp_path, "1 overview/1 learning: loss")]
    # Nothing that was logged waits in a buffer; the kill may fall between the two files.
    assert shown in (killed, killed[:-1])

    # Twice in a row, and at once: the event files' names must not depend on the second.
    for first_step, last_step in ((40, 45), (42, 50)):
        log = start(tmp_path, first_step)
        log.config(Config(run=RunConfig(dir=f"start after {first_step}")), "0123456789ab")
        for step in range(first_step, last_step + 1):
            log.scalars(step, {"loss": -float(step), "tokens": 100 * step})
        log.close()

    expected = [(step, step + 0.5 if step < 40 else -step) for step in range(1, 51)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == expected
    assert points(tmp_path, "1 overview/1 learning: loss") == expected
    # TensorBoard's data server knows nothing of starts: lost points must not be in the files.
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=False).Reload()
    assert [(event.step, event.value) for event in board.Scalars("1 overview/1 learning: loss")] == expected
    assert [event.step for event in board.Tensors("config")] == [0, 40, 42]


def test_a_tensorboard_that_is_open_forgets_lost_steps(tmp_path: Path) -> None:
    log = start(tmp_path)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": 1.0, "heldout_loss": 1.0})
    log.close()
    board = dashboard(tmp_path)
    start(tmp_path, first_step=2).scalars(2, {"loss": 2.0})
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("1 overview/1 learning: loss")] == [(1, 1.0), (2, 2.0)]
    assert [event.step for event in board.Scalars("2 learning/heldout_loss")] == [1]


def test_an_event_file_torn_anywhere_is_cut_to_whole_events(tmp_path: Path) -> None:
    log = start(tmp_path)
    for step in (1, 2):
        log.scalars(step, {"loss": float(step)})
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    contents = file.read_bytes()
    ends = set()
    for size in range(len(contents) + 1):
        file.write_bytes(contents[:size])
        start(tmp_path, first_step=9).close()
        ends.add(file.stat().st_size)
        for other in set(file.parent.iterdir()) - {file}:
            other.unlink()
    assert len(ends) == 5  # nothing, the version, the start, two steps
    assert max(ends) == len(contents)


def test_a_damaged_event_ends_its_file_and_not_the_start(tmp_path: Path) -> None:
    log = start(tmp_path)
    for step in (1, 2, 3):
        log.scalars(step, {"loss": float(step)})
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    contents = file.read_bytes()
    ends = [0]
    while ends[-1] < len(contents):
        [length] = struct.unpack_from("<Q", contents, ends[-1])
        ends.append(ends[-1] + length + 16)
    begin = ends[3]  # of step 2, after the version, the start and step 1
    for place, damage in ((0, b"\0" * 12), (0, b"\1"), (8, b"\0\0\0\0"), (12, b"\xff" * 20)):
        broken = contents[: begin + place] + damage + contents[begin + place + len(damage) :]
        file.write_bytes(broken)
        log = start(tmp_path, first_step=4)
        log.scalars(4, {"loss": 4.0})
        log.close()
        assert file.read_bytes() == contents[:begin]
        assert points(tmp_path, "1 overview/1 learning: loss") == [(1, 1.0), (4, 4.0)]
        for other in set(file.parent.iterdir()) - {file}:
            other.unlink()


def test_events_out_of_order_lose_only_the_later_ones(tmp_path: Path) -> None:
    log = start(tmp_path)
    log.text(3, "sample", "early")
    for step in (1, 2, 3):
        log.scalars(step, {"loss": float(step)})
    log.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    before = file.stat()
    start(tmp_path, first_step=4).close()
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    start(tmp_path, first_step=3).close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=False).Reload()
    assert [event.step for event in board.Scalars("1 overview/1 learning: loss")] == [1, 2]
    assert "sample" not in board.Tags()["tensors"]


def test_the_last_line_is_amended_only_if_it_is_of_the_step(tmp_path: Path) -> None:
    log = start(tmp_path)
    log.scalars(1, {"loss": 1.0})
    log.amend_last(1, {"heldout_loss": math.inf})
    log.amend_last(1, {"heldout_loss": 2.0})
    log.amend_last(3, {"heldout_loss": 3.0})
    with pytest.raises(ValueError, match="step 2 is not the last: the next can be 4"):
        log.amend_last(2, {"heldout_loss": 4.0})
    log.scalars(4, {"loss": 4.0})
    log.close()
    expected = [
        {"step": 1, "loss": 1.0, "heldout_loss": 2.0},
        {"step": 3, "heldout_loss": 3.0},
        {"step": 4, "loss": 4.0},
    ]
    assert lines(tmp_path) == expected
    log = start(tmp_path, first_step=5)
    log.amend_last(4, {"heldout_loss": 5.0})
    log.close()
    assert lines(tmp_path) == [*expected[:2], {"step": 4, "loss": 4.0, "heldout_loss": 5.0}]
    assert points(tmp_path, "2 learning/heldout_loss")[-1] == (5, 5.0)


def test_amending_starts_a_file_that_is_missing(tmp_path: Path) -> None:
    log = start(tmp_path, first_step=3)
    log.amend_last(2, {"heldout_loss": 1.0})
    log.close()
    assert lines(tmp_path) == [{"step": 2, "heldout_loss": 1.0}]


def test_earlier_metrics_that_cannot_be_read_end_the_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"cannot read .*metrics\.jsonl"):
        start(tmp_path, first_step=3)


def test_a_torn_tail_goes_and_an_unreadable_line_inside_stays(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    good = b'{"step": 1}\nscribble\n{"step": 2}\n'
    for tail in (b'{"step": 3, "lo', b'{"step": 3}', b"\0\0\0\n\0\0", b'{"step": 4}\n{"step": 5}\n'):
        metrics.write_bytes(good + tail)
        log = start(tmp_path, first_step=3)
        log.scalars(4, {"loss": 1.0})
        log.close()
        assert metrics.read_bytes() == good + b'{"step": 4, "loss": 1.0}\n'


def test_a_start_from_nothing_begins_anew(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        log = start(tmp_path)
        log.scalars(0, {"loss": loss})
        log.close()
    assert lines(tmp_path) == [{"step": 0, "loss": 2.0}]
    assert points(tmp_path, "1 overview/1 learning: loss") == [(0, 2.0)]


def test_a_clock_that_was_set_back_does_not_bring_lost_steps_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for first_step, now in ((0, 2e9), (3, 1e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        log = start(tmp_path, first_step)
        for step in range(first_step, first_step + 5):
            log.scalars(step, {"loss": float(first_step)})
        log.close()
    assert points(tmp_path, "1 overview/1 learning: loss") == [(step, 0.0 if step < 3 else 3.0) for step in range(8)]


def test_storage_that_fails_is_told_once_per_file_and_never_raises(tmp_path: Path) -> None:
    reports: list[str] = []
    log = start(tmp_path / "run", reports=reports)
    log.scalars(1, {"loss": 1.0})
    log.close()
    for path in (tmp_path / "run" / "tensorboard").iterdir():
        path.unlink()
    (tmp_path / "run" / "tensorboard").rmdir()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    for step in (2, 3):
        log.scalars(step, {"loss": 1.0})
        log.text(step, "samples", "hello")
    log.close()
    assert len(reports) == 2
    assert "metrics.jsonl: Is a directory" in reports[0]
    assert "tfevents" in reports[1]
