"""What the pods of a JobSet write until it has ended; `kubectl logs` alone ends with the pods that there are."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import IO

from launch.commands import Commands
from launch.gke_manifests import CONTAINER

POLL_SECONDS = 2.0
ALL_SECONDS = 60.0
"""How long pods that have not started are waited for, once one has."""
_LINE = re.compile(rb"(\[[^\]]*\]) (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?Z ?(.*)", re.DOTALL)
_OVERLAP = timedelta(seconds=30)
"""Clocks of nodes differ; what comes twice is left out."""


def follow_pods(commands: Commands, kubectl: Sequence[str], label: str, count: int, over: Callable[[], bool]) -> None:
    """Writes what containers of so many pods write, each line once, until `over`. Ctrl-C ends it."""
    shown: dict[bytes, str] = {}
    while True:
        ended = over()
        if ended or _started(commands, kubectl, label, count, over):
            _follow(commands, kubectl, label, shown)
        if ended:
            return
        time.sleep(POLL_SECONDS)


def _started(commands: Commands, kubectl: Sequence[str], label: str, count: int, over: Callable[[], bool]) -> bool:
    """Whether containers have started: all of them, or those that are the first by some time."""
    some_at, said = None, ""
    while True:
        done = commands.run((*kubectl, "get", "pods", "-l", label, "-o", "json"))
        pods = json.loads(done.out)["items"] if done.code == 0 else []
        states = [
            next(iter(one.get("state", {})), "waiting")
            for pod in pods
            for one in pod.get("status", {}).get("containerStatuses", [{"name": CONTAINER}])
            if one["name"] == CONTAINER
        ]
        started = sum(state != "waiting" for state in states)
        if started >= count:
            return True
        some_at = some_at or (time.monotonic() if started else None)
        if some_at is not None and time.monotonic() > some_at + ALL_SECONDS:
            return True
        what = done.why if done.code else f"{started} of {count} pods have started"
        if what != said:
            commands.say(what)
            said = what
        if over():
            return bool(started)
        time.sleep(POLL_SECONDS)


def _follow(commands: Commands, kubectl: Sequence[str], label: str, shown: dict[bytes, str]) -> None:
    """One `kubectl logs`, to its end: that of the containers that there are, or of the connection."""
    child = commands.start(logs_command(kubectl, label, shown), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    reader = threading.Thread(target=_copy, args=(child.stdout, shown), daemon=True)
    try:
        reader.start()
        reader.join()
    finally:
        commands.end(child)


def logs_command(kubectl: Sequence[str], label: str, shown: Mapping[bytes, str]) -> list[str]:
    """From a little before the newest line that was `shown`."""
    where = ["--tail=100"]
    if shown:
        since = datetime.fromisoformat(max(shown.values())[:19]).replace(tzinfo=UTC) - _OVERLAP
        where = ["--tail=-1", f"--since-time={since:%Y-%m-%dT%H:%M:%SZ}"]
    flags = ("--prefix", "--timestamps", "--follow", "--ignore-errors", "--max-log-requests=1000")
    return [*kubectl, "logs", "-l", label, "-c", CONTAINER, *flags, *where]


def _copy(source: IO[bytes], shown: dict[bytes, str]) -> None:
    """Copies lines that are newer than the newest of their pod, and keeps in mind which that is."""
    for line in source:
        match = _LINE.fullmatch(line)
        if match is None:  # of kubectl itself
            sys.stdout.buffer.write(line)
        else:
            pod, seconds, parts, rest = match.groups()
            at = f"{seconds.decode()}.{(parts or b'').decode():0<9}"
            if at <= shown.get(pod, ""):
                continue
            shown[pod] = at
            sys.stdout.buffer.write(pod + b" " + rest)
        sys.stdout.buffer.flush()
