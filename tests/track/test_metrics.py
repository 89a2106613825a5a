"""metrics.jsonl while it changes under its reader."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

from etils import epath

from lm.track.metrics import NOTHING, Metrics
from lm.train.metrics import Mark
from lm.train.run_directory import RunDirectory
from lm.train.summaries import Summaries

from .conftest import Made


def steps(reader: Metrics, mark: Mark, hold: int | None = None) -> list[int]:
    return [line.step for line in reader.after(mark, hold=hold)]


def test_reads_each_line_once_as_the_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = Metrics(epath.Path(path))
    assert steps(reader, NOTHING) == []
    path.write_text('{"step": 0, "loss": 1.5}\n{"step": 1, "lo')
    assert steps(reader, NOTHING) == [0]
    assert steps(reader, NOTHING) == []  # also without a mark
    with open(path, "a") as file:
        file.write('ss": 2}\nnot a line of it\n{"step": 2}\n')
    assert steps(reader, NOTHING) == [1, 2]


def test_numbers_are_those_that_were_logged(made: Callable[..., Made]) -> None:
    run = made(steps=3)
    summaries = Summaries(RunDirectory(run.path), first_step=0, report=print)
    (run.path / "tensorboard").mkdir(exist_ok=True)
    logged = {"a": 0.1 + 0.2, "b/c": float("inf"), "d": -float("inf"), "e": 2**60 + 1, "f": float("nan")}
    summaries.scalars(0, logged)
    summaries.close()
    (line,) = Metrics(epath.Path(run.metrics)).after(NOTHING, hold=None)
    values = dict(line.values)
    assert math.isnan(values.pop("f"))
    assert values == {name: value for name, value in logged.items() if name != "f"}


def test_what_is_cut_and_done_again_is_not_new(made: Callable[..., Made]) -> None:
    run = made(steps=9)
    for step in range(6):
        run.log(step, loss=step)
    reader = Metrics(epath.Path(run.metrics))
    assert steps(reader, NOTHING) == list(range(6))
    kept = run.metrics.read_bytes().splitlines(keepends=True)[:3]
    os.truncate(run.metrics, sum(map(len, kept)))
    for step in range(3, 8):  # longer than it was
        run.log(step, loss=step, speed=0.123456)
    assert steps(reader, Mark(0, 5)) == [6, 7]


def test_what_is_done_again_otherwise_is_new(made: Callable[..., Made]) -> None:
    run = made(steps=9)
    for step in range(6):
        run.log(step, loss=step)
    os.truncate(run.metrics, len(b"".join(run.metrics.read_bytes().splitlines(keepends=True)[:3])))
    for step in range(3, 7):
        run.log(step, loss=10 * step, rewinds=1)
    reader = Metrics(epath.Path(run.metrics))
    lines = list(reader.after(Mark(0, 5), hold=None))
    assert [(line.mark, line.values["loss"]) for line in lines] == [((1, step), 10 * step) for step in range(3, 7)]


def test_the_last_line_is_held_until_it_is_final(made: Callable[..., Made]) -> None:
    run = made(steps=2)
    run.log(0, loss=1)
    run.log(1, loss=1)
    reader = Metrics(epath.Path(run.metrics))
    assert steps(reader, NOTHING, hold=1) == [0]
    summaries = Summaries(RunDirectory(run.path), first_step=2, report=print)
    summaries.amend_last(1, {"heldout_loss": 3.5})
    summaries.close()
    assert steps(reader, Mark(0, 0), hold=1) == []
    (line,) = reader.after(Mark(0, 0), hold=None)
    assert line.values == {"loss": 1, "heldout_loss": 3.5}
    assert json.loads(run.metrics.read_text().splitlines()[-1]) == {"step": 1, **line.values}
