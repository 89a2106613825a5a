"""What `lm plot` draws: metrics of runs over steps, tokens or time."""

import collections
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from lm.errors import ConfigError
from lm.report.facts import one_line, read_config
from lm.train.metrics import Line, read
from lm.train.run_directory import RunDirectory

Axis = Literal["step", "tokens", "seconds"]

_UNITS = ((2 * 86_400, 86_400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))


@dataclass(frozen=True)
class Curve:
    """Points in the order of x. Where y is NaN, there is a gap."""

    name: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Curves:
    """At least one, each with at least one value."""

    curves: list[Curve]
    x_label: str
    y_label: str
    log: bool
    notes: list[str]
    """What is missing, and why."""


def curves(
    runs: Sequence[str | os.PathLike[str]], metrics: Sequence[str], *, x: Axis, smooth: int, log: bool
) -> Curves:
    """Each metric of each run.

    Args:
      x: steps are counted from 0; seconds are those in steps that count: no saves, evaluations, restarts, replays.
      smooth: each value is the mean of so many points of the metric, up to and with it.
      log: values up to 0 are left out.

    Raises:
      ConfigError: not a run, no such metric in any of them, or nothing that can be drawn.
      StorageError: a run cannot be read.
    """
    if smooth < 1:
        raise ConfigError(f"--smooth must be at least 1, got {smooth}")
    notes, logged = list[str](), dict[str, list[Line]]()
    for run in dict.fromkeys(os.fspath(run) for run in runs):
        logged[run] = _logged(run, notes)
    _refuse_unknown(metrics, [line for lines in logged.values() for line in lines])
    found = []
    for run, lines in logged.items():
        for metric in dict.fromkeys(metrics):
            name = f"{one_line(run)} {one_line(metric)}" if len(set(metrics)) > 1 else one_line(run)
            points = [(at, line.values[metric]) for at, line in _placed(lines, x) if metric in line.values]
            ys = _smoothed([y for _, y in points], smooth)
            ys = [y if math.isfinite(y) and not (log and y <= 0) else math.nan for y in ys]
            if lost := sum(map(math.isnan, ys)):
                what = "not finite, or not above 0" if log else "not finite"
                notes.append(f"{lost} of {len(ys)} values of {one_line(metric)} in {one_line(run)} are {what}")
            if lost < len(ys):
                found.append(Curve(name, [at for at, _ in points], ys))
            elif not points and lines:
                notes.append(f"{one_line(run)} has no {one_line(metric)}")
    if not found:
        raise ConfigError("; ".join(["nothing can be drawn", *notes]))
    label: str = x
    if x == "seconds":
        longest = max(max(curve.x) for curve in found)
        _, unit, name = next(row for row in _UNITS if longest >= row[0])
        found = [Curve(curve.name, [at / unit for at in curve.x], curve.y) for curve in found]
        label = f"{name} in steps"
    return Curves(found, label, ", ".join(map(one_line, dict.fromkeys(metrics))), log, notes)


def _logged(path: str, notes: list[str]) -> list[Line]:
    run = RunDirectory(path)
    if read_config(run.path, []) is None and not run.journal.exists():
        raise ConfigError(f"{one_line(path)} is not a run, it has no config.json")
    lines, damaged = read(run.metrics)
    if damaged:
        notes.append(f"{damaged} lines of {one_line(run.metrics)} cannot be read")
    if not lines:
        notes.append(f"{one_line(path)} has no metrics yet")
    return lines


def _refuse_unknown(metrics: Sequence[str], lines: Sequence[Line]) -> None:
    known = sorted({name for line in lines for name in line.values})
    for metric in metrics if known else ():
        if metric not in known:
            near = get_close_matches(metric, known, n=3, cutoff=0.4) or [name for name in known if metric in name]
            there = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"no metric {one_line(metric)!r} in metrics.jsonl; {one_line(there)}")


def _placed(lines: Sequence[Line], x: Axis) -> Iterator[tuple[float, Line]]:
    """Each line that has a place on this axis."""
    seconds, before, step_seconds = 0.0, -1, 0.0
    for line in lines:
        # Of a step, what lines say is the mean since the one before.
        step_seconds = line.values.get("step_seconds", step_seconds)
        seconds += (line.step - before) * step_seconds
        before = line.step
        if x == "step":
            yield line.step, line
        elif x == "seconds":
            yield seconds, line
        elif "tokens" in line.values:
            yield line.values["tokens"], line


def _smoothed(values: Sequence[float], count: int) -> list[float]:
    """Means over the last `count` that leave out what is not finite, which stays what it is."""
    if count == 1:
        return list(values)
    window: collections.deque[float] = collections.deque(maxlen=count)
    means = []
    for value in values:
        window.append(value)
        finite = [one for one in window if math.isfinite(one)]
        means.append(math.fsum(finite) / len(finite) if math.isfinite(value) else math.nan)
    return means
