"""`lm train CONFIG --supervise`: starts again what a fault has ended, for as long as the run gets further.

In a run of many processes each host has its own; the processes that they start meet at the coordinator, as at the
first start, for which each waits LM_START_SECONDS. A start that does not meet the others is one more in vain.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from os import PathLike

from lm.errors import ConfigError, CorruptionError, DivergedError, Stopped, StorageError
from lm.train.journal import Event, highest, note_aside, read
from lm.train.progress import human_seconds
from lm.train.run_directory import RunDirectory

RESTARTS = 10
BACK_OFF_SECONDS = (1.0, 300.0)
"""Before the first restart in a row, doubled with each, and at most."""
FINAL = (0, ConfigError.exit_code, DivergedError.exit_code, CorruptionError.exit_code, 128 + signal.SIGINT)
"""Exit codes of what is done, of what a restart would not change, and of what somebody wanted."""
_BUG = 1
_POLL_SECONDS = 0.1


def supervise_training(config: Sequence[str], options: Sequence[str], *, restarts: int | None) -> int:
    """`lm train` of a config (CONFIG and what it overrides) with options, supervised."""
    lm = (sys.executable, "-m", "lm")
    return supervise(
        [*lm, "train", *config, *options],
        lambda: _journal([*lm, "config", "show", "--json", *config]),
        restarts=RESTARTS if restarts is None else restarts,
    )


def supervise(command: Sequence[str], journal: Callable[[], str | PathLike[str] | None], *, restarts: int) -> int:
    """Runs the command until it is done, cannot be done, or is asked to stop. Returns its last exit code.

    It ends too after so many `restarts` in a row in which the run got no further: no new step, none newly saved; and
    when a bug ends it twice at the same step. SIGTERM and SIGINT are passed on, and nothing is started again.

    Args:
      journal: where the journal of the run is, as far as that can be known; asked when something has failed.
    """
    asked: list[int] = []
    handled = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in handled}
    try:
        return _supervise(command, journal, restarts, asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _supervise(
    command: Sequence[str], journal: Callable[[], str | PathLike[str] | None], restarts: int, asked: list[int]
) -> int:
    best, path, in_vain, bug_at = (0, 0), None, 0, -1
    while True:
        began = time.monotonic()
        number, code = _run(command, asked)
        if asked or code in FINAL:
            return code
        path = path or journal()
        events = _events(path)
        reached = highest(events, "saved"), highest(events, "done", "was_done")
        if reached[0] > best[0] or reached[1] > best[1]:
            best, in_vain = (max(best[0], reached[0]), max(best[1], reached[1])), 0
        in_vain += 1
        own = [e for e in events if e.get("pid") == number and e.get("host") == socket.gethostname()]
        last = [e for e in events if own and e.get("start") == own[-1]["start"]][-1:]
        stood = last[0]["done"] if last else reached[1]
        why = None
        if code == _BUG and stood == bug_at:
            why = f"ended twice with a bug, at the same step {stood}"
        elif in_vain > restarts:
            why = f"--restarts {restarts} in a row got no further than step {best[1]} ({best[0]} saved)"
        bug_at = stood if code == _BUG else -1
        first, longest = BACK_OFF_SECONDS
        wait = min(first * 2 ** min(in_vain - 1, 30), longest)
        then = f"starts again in {human_seconds(wait)}" if why is None else f"does not start again: {why}"
        at = f"at step {stood}" if last and last[0]["event"] == "end" else f"at step {stood} or later"
        _say(f"{_ending(code)} after {human_seconds(time.monotonic() - began)}, {at}; {then}")
        if own and path is not None:  # that of the primary: else somebody else writes
            note_aside(path, "supervisor", {"of": own[-1]["start"], "code": code, "then": then}, _say)
        if why is not None:
            return code
        until = time.monotonic() + wait
        while time.monotonic() < until:
            if asked:
                return Stopped.exit_code
            time.sleep(_POLL_SECONDS)


def _run(command: Sequence[str], asked: list[int]) -> tuple[int, int]:
    """The process number, and the exit code as a shell has it."""
    # A session of its own: Ctrl-C on a terminal would reach it a second time, which means to hurry.
    parent = os.getpid()
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: _stop_with(parent))
    passed = 0
    while child.poll() is None:
        for number in asked[passed:]:
            child.send_signal(number)
            passed += 1
        time.sleep(_POLL_SECONDS)
    with contextlib.suppress(ProcessLookupError):  # what it may have left behind, and what could be in the way
        os.killpg(child.pid, signal.SIGKILL)
    return child.pid, child.returncode if child.returncode >= 0 else 128 - child.returncode


def _stop_with(parent: int) -> None:
    """In the child: when the supervisor is killed, it saves and ends."""
    if sys.platform.startswith("linux"):
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # killed before that
            os._exit(128 + signal.SIGTERM)


def _journal(show: Sequence[str]) -> str | PathLike[str] | None:
    """Of the run that a config is for. Another process reads it, for which it may need jax, as this one does not."""
    shown = subprocess.run(show, capture_output=True, text=True, start_new_session=True)
    try:
        return RunDirectory(json.loads(shown.stdout)["run"]["dir"]).journal
    except (ValueError, KeyError, TypeError):
        _say("what the run has done cannot be known: its config cannot be read any more")
        return None


def _events(path: str | PathLike[str] | None) -> list[Event]:
    try:
        return read(path) if path is not None else []
    except StorageError as error:
        _say(str(error))
        return []


def _ending(code: int) -> str:
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone ends no run
        print(f"lm: supervisor: {line}", file=sys.stderr, flush=True)
