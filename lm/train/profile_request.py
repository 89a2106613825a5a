"""How a run is asked for a trace while it runs: two small files in its directory, also in a bucket.

    profile          the request: what `lm profile RUN --now` writes, or anyone with `touch`; gone when it was taken
    profile.answer   the trace that was taken for the newest request, or why there is none

A file and no signal: it reaches the one process that traces from any machine and into any container, and schedulers
send SIGUSR1 and SIGUSR2 for reasons of their own (SLURM's --signal), before the end of a job.
"""

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from lm.files import is_url, write_atomically

REQUEST, ANSWER = "profile", "profile.answer"
USUAL_STEPS = 5
LOCAL_SECONDS, BUCKET_SECONDS = 1.0, 15.0
"""Between two looks, which cost one `stat`, or one question to the bucket."""


def look_seconds(directory: str | os.PathLike[str]) -> float:
    return BUCKET_SECONDS if is_url(directory) else LOCAL_SECONDS


@dataclasses.dataclass(frozen=True)
class Request:
    """A trace of so many steps, from the next one on."""

    steps: int = USUAL_STEPS
    id: str = ""
    """Returned with the answer, by which whoever asked knows it."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The name of the trace, or else the problem."""

    id: str
    trace: str = ""
    problem: str = ""


def ask(directory: str | os.PathLike[str], request: Request) -> None:
    """Raises StorageError when it cannot be written."""
    write_atomically(epath.Path(directory) / REQUEST, json.dumps(dataclasses.asdict(request)).encode())


def is_taken(directory: str | os.PathLike[str]) -> bool:
    return not (epath.Path(directory) / REQUEST).exists()


def withdraw(directory: str | os.PathLike[str]) -> None:
    (epath.Path(directory) / REQUEST).unlink(missing_ok=True)


def answer(directory: str | os.PathLike[str], given: Answer) -> None:
    """Raises StorageError when it cannot be written."""
    write_atomically(epath.Path(directory) / ANSWER, json.dumps(dataclasses.asdict(given)).encode())


def answered(directory: str | os.PathLike[str], id: str) -> Answer | None:
    """The answer to the request with this id, once it is there."""
    try:
        found = Answer(**json.loads((epath.Path(directory) / ANSWER).read_bytes()))
    except Exception:  # not there yet, or of another time; storage libraries raise classes of their own
        return None
    return found if found.id == id else None


class Watch:
    """A thread that looks for requests and gives them to `wanted`, until it is closed. Failing storage is not said:
    it is said by all else that reads and writes there."""

    def __init__(self, directory: str | os.PathLike[str], wanted: Callable[[Request], None]):
        self._directory, self._wanted = epath.Path(directory), wanted
        self._began = time.time()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="profile requests", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()  # not waited for: a question to a bucket may hang

    def _run(self) -> None:
        while not self._closed.wait(look_seconds(self._directory)):
            try:
                request = self._take()
            except Exception:  # storage libraries raise classes of their own
                continue
            if request is not None and not self._closed.is_set():
                self._wanted(request)

    def _take(self) -> Request | None:
        file = self._directory / REQUEST
        if not file.exists():
            return None
        text = file.read_bytes()
        file.unlink()
        return _parsed(text)


def _parsed(text: bytes) -> Request:
    """An empty file, or one that is no request, is one for the usual number of steps."""
    try:
        found: Any = json.loads(text)
        request = Request(int(found["steps"]), str(found["id"]))
    except (ValueError, KeyError, TypeError):
        return Request()
    return request if request.steps >= 1 else Request(id=request.id)
