"""A trace of a run that is going on: asked for, and waited for."""

import sys
import time
import uuid

from lm.errors import ConfigError, StorageError
from lm.train.config import MOST_PROFILED_STEPS
from lm.train.journal import read as read_journal
from lm.train.profile_request import USUAL_STEPS, Request, answered, ask, look_seconds, withdraw
from lm.train.run_directory import RunDirectory, is_held

PATIENCE = 30
"""Looks of the run within which it takes a request; it looks only while it does steps."""


def take(run: RunDirectory, *, steps: int | None = None) -> str:
    """Asks for a trace of the next steps and returns its name once it is there. What it waits for goes to stderr.

    Raises:
      ConfigError: not a possible number of steps; the run does not run, or ended before; another has just asked.
      StorageError: the request cannot be written, is not taken, or the trace failed.
    """
    steps = USUAL_STEPS if steps is None else steps
    if not 1 <= steps <= MOST_PROFILED_STEPS:
        raise ConfigError(f"--steps must be from 1 to {MOST_PROFILED_STEPS}, got {steps}")
    if not is_going_on(run):
        raise ConfigError(
            f"{run.path} is not going on, so no step can be traced now; `lm train {run.path} --profile.steps 20:25` "
            f"traces these when it does, and `lm profile {run.path}` reads a trace that is there"
        )
    request = Request(steps, uuid.uuid4().hex[:12])
    ask(run.path, request)
    try:
        return _wait(run, request)
    except KeyboardInterrupt:
        _say(f"stopped waiting; if the run has taken the request, `lm profile {run.path}` will have the trace")
        raise
    finally:
        withdraw(run.path, request)


def _wait(run: RunDirectory, request: Request) -> str:
    _say(f"asked for {request.steps} steps; Ctrl-C stops waiting")
    seconds, taken = look_seconds(run.path), False
    pause, until = min(seconds / 4, 1.0), time.monotonic() + PATIENCE * seconds
    while True:
        going_on = is_going_on(run)  # before the answer is looked for, which comes before the end
        if found := answered(run.path, request.id):
            if found.problem:
                raise StorageError(f"there is no trace: {found.problem}")
            if found.trace:
                return found.trace
            if not taken:
                taken = True
                _say("the run has taken the request, and traces its next steps")
        if not going_on:
            raise ConfigError(f"{run.path} ended before the trace was taken; {run.log} says why")
        if not taken and time.monotonic() > until:
            raise StorageError(
                f"{run.path} does not take the request: for {PATIENCE * seconds:.0f} s it did not begin its steps, or "
                f"it hangs, or was started by an older version of lm; {run.log} says what it does"
            )
        time.sleep(pause)


def is_going_on(run: RunDirectory) -> bool:
    """Whether a process trains it: by its lock, which the kernel frees; where there are no locks, as in a bucket, by
    its journal, in which a run that was killed goes on."""
    held = is_held(run.path)
    if held is None:
        events = [event for event in read_journal(run.journal) if "start" in event]
        return bool(events) and events[-1]["event"] != "end"
    return held


def _say(line: str) -> None:
    print(f"lm: {line}", file=sys.stderr, flush=True)
