"""What the files of a run say when they are read once, quickly, while it may go on."""

import json
import os
import re
import socket
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from lm.errors import ConfigError, StorageError
from lm.files import reason
from lm.train.goodput import Goodput, goodput
from lm.train.journal import Event, read
from lm.train.metrics import Line, latest, recent
from lm.train.now import read_now
from lm.train.progress import printable
from lm.train.run_directory import RunDirectory, is_held

SILENT_SECONDS, SILENT_WRITES = 60.0, 5
"""A run is heard of as long as its now.json is younger than that, or than so many times what is between two writes."""
RESTART_SECONDS = 600.0
"""What a supervisor waits before a start, at most, and a start for all its processes."""

STATES = {
    "running": "a process trains it",
    "restarting": "a supervisor has said that it starts it again",
    "done": "all steps are done",
    "stopped": "it was asked to stop, and saved; it can go on",
    "failed": "it has ended with an error",
    "killed": "its process is gone, and could not say why",
    "silent": "nothing is heard of it, and from this machine its process cannot be seen: killed, or cut off",
    "unknown": "it has no journal",
}
_STOPPED = (75, 130)


@dataclass(frozen=True)
class Facts:
    """Of one run."""

    directory: RunDirectory
    at: float
    """When they were read, in seconds since 1970."""
    config: Mapping[str, Any]
    """As it stands in config.json; empty where that cannot be read, or is not written yet."""
    events: list[Event]
    now: Mapping[str, Any] | None
    """now.json, if it is of the newest start."""
    held: bool | None
    """See `is_held`."""
    lines: list[Line]
    """The last of metrics.jsonl."""
    heldout: Line | None
    """The last that was evaluated."""
    problems: list[str]
    """What could not be read."""

    @property
    def start(self) -> Event | None:
        """The newest start."""
        return next((event for event in reversed(self.events) if event["event"] == "start"), None)

    @property
    def last(self) -> Event | None:
        """The last event of the newest start."""
        start = self.start
        return start and next(event for event in reversed(self.events) if event.get("start") == start["start"])

    @property
    def end(self) -> Event | None:
        """How the newest start has ended, if it could say."""
        return self.last if self.last and self.last["event"] == "end" else None

    @property
    def supervisor(self) -> Event | None:
        """What the supervisor of the newest start has said after its end."""
        last, start = self.events[-1] if self.events else None, self.start
        return last if last and start and last["event"] == "supervisor" and last.get("of") == start["start"] else None

    @property
    def heard(self) -> float | None:
        """When the newest start gave its last sign of life, by the clock of its machine."""
        signs = [source["time"] for source in (self.now, self.last) if source]
        return max(signs, default=None)

    @property
    def state(self) -> str:
        """One of STATES. Where locks tell nothing, signs of life do, by the clocks of two machines."""
        if self.held:
            return "running"
        if self.start is None:
            return "unknown"
        said = self.supervisor
        if said and str(said.get("then")).startswith("starts again") and self.at - said["time"] < RESTART_SECONDS:
            return "restarting"
        if self.end:
            code = self.end.get("code")
            return "done" if code == 0 else "stopped" if code in _STOPPED else "failed"
        if said or (self.held is False and self.start.get("host") == socket.gethostname()):
            return "killed"
        every = self.now["every"] if self.now else SILENT_SECONDS
        quiet = self.at - self.heard if self.heard is not None else float("inf")
        return "running" if quiet < max(SILENT_SECONDS, SILENT_WRITES * every) else "silent"

    @property
    def doing(self) -> str | None:
        """Of one that is running, in the words of lm/train/now.py; None where it cannot be known."""
        if self.state != "running":
            return None
        if self.end or self.start is None:
            return "start"  # of the next start, which has the lock, but is not in the journal yet
        return self.now["doing"] if self.now else None

    @property
    def done(self) -> int:
        """Finished steps, of which the last ones may not be saved."""
        logged = self.lines[-1].step + 1 if self.lines else 0
        return max(logged, self.last["done"] if self.last else 0, int(self.now["done"]) if self.now else 0)

    @property
    def steps(self) -> int | None:
        """Planned."""
        steps = section(self.config, "train").get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def goodput(self) -> Goodput:
        """Until the last event: a run that goes on has one a minute, later more rarely."""
        return goodput(self.events)

    @property
    def wall_seconds(self) -> float | None:
        """From the first start until the last sign of life."""
        if self.start is None:
            return None
        since = self.heard - self.last["time"] if self.heard is not None and self.last else 0.0
        return self.goodput.total / 1000 + max(since, 0.0)

    def value(self, name: str) -> float | None:
        """Of the last line of metrics.jsonl."""
        return self.lines[-1].values.get(name) if self.lines else None

    def median(self, name: str) -> float | None:
        """Of the last lines of metrics.jsonl: what is usual now."""
        values = [line.values[name] for line in self.lines if name in line.values]
        return statistics.median(values) if values else None


def read_facts(path: str | os.PathLike[str]) -> Facts:
    """Reads them.

    Raises:
      ConfigError: it is no run.
      StorageError: it cannot be read.
    """
    run, problems = RunDirectory(path), list[str]()
    config = read_config(run.path, problems)
    events = read(run.journal)
    if config is None and not events:
        raise ConfigError(f"{one_line(run.path)} is not a run, it has no config.json")
    start = next((event["start"] for event in reversed(events) if event["event"] == "start"), None)
    now = read_now(run.now)
    return Facts(
        directory=run,
        at=time.time(),
        config=config or {},
        events=events,
        now=now if now and now["start"] == start else None,
        held=is_held(run.path),
        lines=recent(run.metrics),
        heldout=latest(run.metrics, "heldout_loss"),
        problems=problems,
    )


def read_config(path: epath.Path, problems: list[str]) -> dict[str, Any] | None:
    """config.json of a run as it is, without what it takes to understand it; empty where it is damaged, which is added
    to `problems`; None where there is none. Raises StorageError when it cannot be read."""
    file = path / "config.json"
    try:
        contents = file.read_bytes() if file.exists() else None
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot read {one_line(file)}: {reason(error)}") from error
    if contents is None:
        return None
    try:
        found = json.loads(contents)
        if isinstance(found, dict):
            return found
        problems.append("config.json holds no config")
    except ValueError as error:
        problems.append(f"config.json cannot be read: {error}")
    return {}


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Empty where there is none."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def one_line(text: object) -> str:
    """To be printed: without control characters and ends of lines."""
    return re.sub(r"\s", " ", printable(str(text)))
