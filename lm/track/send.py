"""Sends what is new in a run's metrics.jsonl to a tracker.

What has arrived there stands in `trackers/<name>.json` of the run; what the tracker itself says goes first.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from itertools import islice

from lm.errors import ConfigError, StorageError
from lm.files import is_url, write_atomically
from lm.track.metrics import NOTHING, Metrics
from lm.track.tracker import State, TrackedRun, open_tracker
from lm.train import journal
from lm.train.metrics import Mark
from lm.train.run_directory import RunDirectory

LINES = 1000
"""Given to a tracker at once, after which it is noted what has arrived."""


class Sending:
    """A run and a tracker that it is sent to. What fails raises what the library of the tracker does.

    Raises:
      ConfigError: the run never started.
      StorageError: it cannot be read.
    """

    def __init__(self, run: RunDirectory, name: str):
        self._run, self._tracker = run, open_tracker(name)
        self._events = journal.read(run.journal)
        self._id = journal.run_of(self._events)
        if not self._id:
            raise ConfigError(f"{run.path} has nothing to send: {run.journal} knows of no start")
        self._config = json.loads(run.config.read_bytes())
        self._metrics, self._noted = Metrics(run.metrics), run.path / "trackers" / f"{name}.json"
        self._given = self._arrived = self._read()

    def begin(self, facts: Mapping[str, str]) -> str | None:
        """Begins to track the run, or goes on; where it can be seen. `facts`: of the code."""
        starts = [event for event in self._events if event["event"] == "start"]
        path = self._run.path
        tracked = TrackedRun(
            id=self._id,
            name=path.name if is_url(path) else os.path.basename(os.path.abspath(path)),
            config=self._config,
            facts={"host": str(starts[-1].get("host", "")), **facts},
            folder=None if is_url(path) else os.path.abspath(self._noted.parent),
        )
        there = self._tracker.begin(tracked)
        if there is not None:
            self._given = self._arrived = there
        self._note()
        return self._tracker.url

    def send(self, *, over: bool) -> int:
        """Sends what is new, and returns how many lines that was. While the run is not `over`, its last one may change
        and is kept back; so it is when the run did not get done."""
        count = 0
        lines = self._metrics.after(self._given, hold=self._hold(over))
        try:
            while part := list(islice(lines, LINES)):
                self._tracker.scalars(part)
                self._given = part[-1].mark
                count += len(part)
                self._see()
        finally:
            self._see()
        return count

    def finish(self, otherwise: State) -> None:
        """Waits until all has arrived. `otherwise`: how a run ended that does not say it."""
        code = self._code()
        ended: State = "finished" if code == 0 else "stopped" if code in (75, 130) else "failed"
        try:
            self._tracker.finish(otherwise if code is None else ended)
        finally:
            self._see()

    def missing(self) -> int:
        """How many lines are not known to have arrived."""
        return sum(1 for _ in Metrics(self._run.metrics).after(self._arrived, hold=self._hold(over=True)))

    def _hold(self, over: bool) -> int | None:
        return None if over and self._code() == 0 else int(self._config["train"]["steps"]) - 1

    def _code(self) -> int | None:
        """Of the newest start, when it has ended."""
        self._events = journal.read(self._run.journal)
        last: journal.Event = {}
        for event in self._events:
            if event["event"] in ("start", "end"):
                last = event
        return last["code"] if last.get("event") == "end" else None

    def _see(self) -> None:
        arrived = self._tracker.received()
        if arrived is not None and arrived != self._arrived:
            self._arrived = arrived
            self._note()

    def _read(self) -> Mark:
        with contextlib.suppress(Exception):  # of a storage library, too; then the tracker says it, or all is sent
            noted = json.loads(self._noted.read_bytes())
            if noted["run"] == self._id:
                return Mark(int(noted["rewinds"]), int(noted["step"]))
        return NOTHING

    def _note(self) -> None:
        noted = {"run": self._id, "url": self._tracker.url} | self._arrived._asdict()
        with contextlib.suppress(StorageError):  # a full disk is no reason not to send
            write_atomically(self._noted, (json.dumps(noted) + "\n").encode())
