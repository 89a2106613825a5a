"""How a run is asked for a trace while it runs: two small files in its directory, also in a bucket.

    profile          the request: what `lm profile RUN --now` writes, or anyone with `touch`; gone when it was taken
    profile.answer   for each of the newest requests: that the run has it, then the trace, or why there is none

A file and no signal: it reaches the one process that traces from any machine and into any container, and schedulers
send SIGUSR1 and SIGUSR2 for reasons of their own (SLURM's --signal), before the end of a job.
"""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable
from typing import Any

from etils import epath

from lm.errors import ConfigError, StorageError
from lm.files import is_url, reason, write_atomically

REQUEST, ANSWER = "profile", "profile.answer"
USUAL_STEPS = 5
LOCAL_SECONDS, BUCKET_SECONDS = 1.0, 15.0
"""Between two looks, which cost one `stat`, or one question to the bucket."""
KEPT = 8
"""Answers that stay, so that each is read before later ones take its place."""


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
    """The name of the trace, or else the problem; neither as long as the run only has the request."""

    id: str
    trace: str = ""
    problem: str = ""


def ask(directory: str | os.PathLike[str], request: Request) -> None:
    """Raises ConfigError while another request is there, and StorageError when it cannot be written."""
    file = epath.Path(directory) / REQUEST
    try:
        there = file.exists()
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot look for {file}: {reason(error)}") from error
    if there:
        raise ConfigError(f"a trace is asked for already: {file} is there until the run takes it; then ask again")
    write_atomically(file, json.dumps(dataclasses.asdict(request)).encode())


def withdraw(directory: str | os.PathLike[str], request: Request) -> None:
    """Nothing happens when it is not there any more."""
    file = epath.Path(directory) / REQUEST
    with contextlib.suppress(Exception):  # of a storage library, too
        if _parsed(file.read_bytes()) == request:
            file.unlink()


def answered(directory: str | os.PathLike[str], id: str) -> Answer | None:
    """The answer to the request with this id, once it is there."""
    try:
        found = [Answer(**one) for one in json.loads((epath.Path(directory) / ANSWER).read_bytes())]
    except Exception:  # not there yet, or of another time; storage libraries raise classes of their own
        return None
    return next((one for one in found if one.id == id), None)


class Watch:
    """A thread that looks for requests and gives them to `wanted`, until it is closed; and writes the answers. Failing
    storage is not said: it is said by all else that reads and writes there."""

    def __init__(self, directory: str | os.PathLike[str], wanted: Callable[[Request], None]):
        self._directory, self._wanted = epath.Path(directory), wanted
        self._answers, self._written = tuple[Answer, ...](), tuple[Answer, ...]()
        self._mutex, self._writing = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="profile requests", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed.set()  # not waited for: a question to a bucket may hang

    def answer(self, given: Answer) -> None:
        """What cannot be written is tried again with each look."""
        with self._mutex:
            others = (one for one in self._answers if one.id != given.id)
            self._answers = (*others, given)[-KEPT:]
        self._write()

    def _run(self) -> None:
        while not self._closed.wait(look_seconds(self._directory)):
            self._write()
            try:
                request = self._take()
            except Exception:  # storage libraries raise classes of their own
                continue
            if request is not None and not self._closed.is_set():
                if request.id:
                    self.answer(Answer(request.id))
                self._wanted(request)

    def _write(self) -> None:
        if not self._writing.acquire(blocking=False):  # another thread does it, and may hang
            return
        try:
            while (answers := self._answers) != self._written:
                write_atomically(self._directory / ANSWER, json.dumps(list(map(dataclasses.asdict, answers))).encode())
                self._written = answers
        except StorageError:
            pass
        finally:
            self._writing.release()

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
