"""journal.jsonl: what happened to a run, start by start, one JSON object per event.

    start       pid, host, command, and what else identifies this start
    restored    from which checkpoint
    compiled
    accounts    at the first step, then once a minute, later more rarely
    saved       a good checkpoint is there; the first of each start, and some of the others
    rewind      the steps from `done` to `was_done` are undone
    end         exit code and reason; missing when the process was killed
    supervisor  of `lm train --supervise`: how the process ended, and what followed

Each but the last kind has the id of its start, the wall time, and as of then: `milliseconds` by cause since this start
began (lm/train/goodput.py), the steps `done`, and the newest step `saved`. So the last event of a start says all that
is known of it, and the next start drops `accounts` and `saved` that came before it.
"""

import json
import math
import os
import shlex
import socket
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from time import time as wall_time
from types import TracebackType
from typing import Any, Self

from etils import epath

from lm.errors import ConfigError, HangError, StorageError
from lm.files import AppendOnlyFile, reason
from lm.train.goodput import CAUSES, Goodput, goodput
from lm.train.run_directory import RunDirectory

ACCOUNTS_SECONDS, ACCOUNTS_SHARE = 60.0, 0.01
"""Between accounts: at least so long, and this share of what the start has run, so that months stay small. What came
after the last accounts of a start that is killed is lost time."""

Event = dict[str, Any]


class Journal:
    """Notes what this start does and where its time goes; inside `with`, also how it ends.

    One thread uses it, that which trains. Failing storage never raises once this is made: it is told to `report` once.
    Without a path it only keeps accounts: for processes of a run that are not its primary.

    Args:
      facts: values for JSON, noted with the start.
      began: when this start did, by `time.monotonic`.

    Raises:
      StorageError: what earlier starts noted cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        facts: Mapping[str, Any],
        began: float,
        report: Callable[[str], None],
    ):
        self._file = None if path is None else AppendOnlyFile(path, report)
        self.start = uuid.uuid4().hex[:12]
        """The id of this start."""
        self._mark, self._seconds = began, dict.fromkeys(CAUSES, 0.0)
        self._causes = ["start"]  # those under way, each in the one before it
        self._done = 0
        self._saved: int | None = None
        self._began, self._due, self._noted_save = began, 0.0, False
        earlier = [] if path is None else read(path)
        self._new_from = highest(earlier, "done", "was_done")
        who = {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.argv)[:1000]}
        start = self._event("start", who | dict(facts), time=wall_time() - (monotonic() - began))
        if self._file is not None:
            self._file.replace(_text([*_needed(earlier), start]))  # without what a crash has cut; and on the disk now
            self._file.close()  # into a bucket at once
        self._before = goodput([*earlier, start])
        self.run = run_of([*earlier, start])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        facts: dict[str, Any] = {"code": 0}
        if error is not None:
            code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
            facts = {"code": code, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        self.note("end", **facts)
        if self._file is not None:
            self._file.close()

    @contextmanager
    def time(self, cause: str) -> Iterator[None]:
        """What is spent inside has this cause, but for what is spent in another `time` inside.

        "step" is all that is not waiting for something else while there are steps; `step` says whether they are new.
        Outside of all it is "start" until the first step, then "other".
        """
        assert cause in CAUSES, cause
        self._charge()
        self._causes.append(cause)
        try:
            yield
        finally:
            self._charge()
            self._causes.pop()

    def restored(self, step: int, tier: str) -> None:
        """The state is that of a checkpoint, with so many steps done."""
        self._done = step
        if tier == "durable":
            self._saved = step
        self.note("restored", tier=tier)

    def step(self, k: int) -> None:
        """Step k is done; steps that were done before are replayed. For each step."""
        if self._done < self._new_from:
            self._charge()
        self._done = k + 1
        if self._causes[0] == "start" or monotonic() >= self._due:
            self._causes[0] = "other"
            self.note("accounts")

    def saved(self, step: int | None) -> None:
        """The newest good checkpoint is of so many steps done; at once when it is the same as before."""
        if step is None or step == self._saved:
            return
        self._saved = step
        if not self._noted_save or monotonic() >= self._due:
            self._noted_save = True
            self.note("saved")

    def rewind(self, step: int) -> None:
        """The state is again that of a checkpoint: what was done after it is done again, as a replay."""
        self._charge()
        was_done, self._done = self._done, step
        self._new_from = max(self._new_from, was_done)
        self.note("rewind", was_done=was_done)

    def note(self, event: str, **facts: Any) -> None:
        """Appends an event, with the accounts as they are."""
        self._charge()
        if self._file is not None:
            self._file.append(_text([self._event(event, facts, time=wall_time())]))
        self._due = self._mark + max(ACCOUNTS_SECONDS, ACCOUNTS_SHARE * (self._mark - self._began))

    def hung(self, text: str) -> None:
        """The end of a process that hangs. From the thread that has noticed it."""
        self.note("end", code=HangError.exit_code, reason=f"HangError: {text}"[:300])

    def goodput(self) -> Goodput:
        """Of the whole run, until now."""
        self._charge()
        return self._before.plus(self._milliseconds())

    def now(self) -> tuple[str, int]:
        """What is under way, a cause, and the steps done. From any thread."""
        causes, done = self._causes[-2:], self._done  # a copy: the other thread goes on
        # What waits for input on held-out text is an evaluation.
        cause = causes[0] if causes[-1] == "input" and causes[0] != "step" else causes[-1]
        return ("replay" if cause == "step" and done < self._new_from else cause), done

    def _charge(self) -> None:
        now, cause = monotonic(), self._causes[-1]
        if cause == "step" and self._done < self._new_from:
            cause = "replay"
        self._seconds[cause] += now - self._mark
        self._mark = now

    def _milliseconds(self) -> dict[str, int]:
        return {cause: round(1000 * seconds) for cause, seconds in self._seconds.items() if seconds}

    def _event(self, event: str, facts: Mapping[str, Any], time: float) -> Event:
        known = {"event": event, "start": self.start, "time": round(time, 3), "done": self._done, "saved": self._saved}
        return known | {"milliseconds": self._milliseconds()} | dict(facts)


def read(path: str | os.PathLike[str]) -> list[Event]:
    """The events, oldest first; none where there is no file. What a crash has left of one is left out.

    Raises:
      StorageError: the file cannot be read.
    """
    file = epath.Path(path)
    try:
        contents = file.read_bytes() if file.exists() else b""
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot read what happened to the run before, in {file}: {reason(error)}") from error
    return [event for event in map(_parsed, contents.split(b"\n")) if event is not None]


def note_aside(
    path: str | os.PathLike[str], event: str, facts: Mapping[str, Any], report: Callable[[str], None]
) -> None:
    """Appends an event that is of no start. Only while no start can write."""
    file = AppendOnlyFile(path, report)
    text = _text([{"event": event, "time": round(wall_time(), 3)} | dict(facts)])
    file.append(b"\n" + text)  # what a crash has cut must not swallow it
    file.close()


def run_of(events: Iterable[Event]) -> str:
    """Tells the run from any other, also from one that was in its place before: the id of its first start."""
    return next((event["start"] for event in events if "start" in event), "")


def facts_of_last(events: Iterable[Event], names: Iterable[str]) -> dict[str, Any]:
    """What was noted under these names with the newest start; nothing where there is none."""
    last: Event = {}
    for event in events:
        if event.get("event") == "start":
            last = event
    return {name: last[name] for name in names if name in last}


def highest(events: Iterable[Event], *names: str) -> int:
    """The largest value under any of the names; 0 without any."""
    return max((event[name] for event in events for name in names if event.get(name) is not None), default=0)


def refuse_lost_checkpoints(run: RunDirectory) -> None:
    """Starting over is for runs that never saved anything.

    Raises:
      ConfigError: the journal says that steps were saved, or without a journal metrics.jsonl that steps were done, and
        there is no checkpoint.
    """
    from lm.checkpoint.folder import names_set_aside, saved_steps  # the import is slow, and a supervisor needs no jax

    if saved_steps(run.checkpoints) or names_set_aside(run.checkpoints):
        return
    events = read(run.journal)
    saved = highest(events, "saved")
    what = f"step {saved} was saved, as {run.journal} says" if saved else ""
    earlier = {event["start"] for event in events[:-1] if "start" in event}  # the last may be of this start
    if not earlier and run.metrics.exists() and run.metrics.stat().length and not highest(events, "done"):
        what = f"steps were done, as {run.metrics} says"
    if what:
        raise ConfigError(
            f"{what}, but {run.checkpoints} has no checkpoint: the run would start over. Was it deleted, or is another "
            "disk or bucket there now? Put the checkpoints back, or choose another run.dir. To start over here, "
            f"delete {run.path}"
        )


_PASSING = ("accounts", "saved")


def _needed(events: list[Event]) -> list[Event]:
    """Without those of which a later event of the same start says all."""
    last = {event["start"]: event for event in events if "start" in event}
    return [e for e in events if e["event"] not in _PASSING or e is last[e["start"]]]


def _text(events: Iterable[Event]) -> bytes:
    return b"".join(json.dumps(event, default=str).encode() + b"\n" for event in events)


def _parsed(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
        sound = isinstance(event["event"], str) and math.isfinite(event["time"])
        if "start" in event or event["event"] in _PASSING:
            numbers = [event["done"], *event["milliseconds"].values()]
            numbers += [event[name] for name in ("saved", "was_done") if event.get(name) is not None]
            sound = sound and isinstance(event["start"], str) and all(isinstance(x, int) for x in numbers)
        return event if sound else None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
