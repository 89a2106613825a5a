"""Reads that fail, or never end: tried again, known by name while they last, and in the end given up."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from lm.errors import DataError

WAITS = (2.0, 8.0)
"""Seconds before each further attempt at a read that failed."""
SAY_SECONDS = 60.0
"""How often it is said what is waited for."""

_log = logging.getLogger(__name__)
_LOGGER = "lm.data"
_Result = TypeVar("_Result")


class Damage(Exception):
    """What was read is not what was written; the message says so, and what to do."""


class Reading(NamedTuple):
    what: str | None
    """None: no read is under way."""
    since: float
    """When that began, by `time.monotonic`."""


class Reads:
    """The reads of one thread. Other threads may look at what it reads `now`."""

    def __init__(self) -> None:
        self.now = Reading(None, time.monotonic())

    def __call__(self, what: str, read: Callable[[], _Result]) -> _Result:
        """What `read` gives, which is called again when it fails; what is damaged may be so only on its way here.

        Raises DataError that names `what`, and FileNotFoundError as it comes: the caller knows what that means.
        """
        waits, damaged = iter(WAITS), False
        while True:
            self.now = Reading(what, time.monotonic())
            try:
                return read()
            except FileNotFoundError:
                raise
            except (Damage, OSError, RuntimeError, IndexError) as error:
                problem = f"{what}: {error}" if isinstance(error, Damage) else f"{what} cannot be read: {error}"
                wait = next(waits, None)
                if isinstance(error, Damage) or "orrupted" in str(error):  # as ArrayRecord says it
                    wait, damaged = None if damaged else 0.0, True
                if wait is None:
                    raise DataError(problem) from None
                _log.warning("%s; trying again in %g s", problem, wait)
                time.sleep(wait)
            finally:
                self.now = Reading(None, time.monotonic())


def awaited(
    answers: queue.Queue[_Result], what: str, seconds: float, makers: Callable[[], Sequence[Reading]]
) -> _Result:
    """The next of the `answers`; says from time to time what the busy `makers` are reading.

    Raises DataError when one of them did not begin or end a read for so many `seconds`. It may hang for ever: whoever
    ends because of this must not wait for its thread.
    """
    began, said = time.monotonic(), 1
    while True:
        try:
            return answers.get(timeout=min(1.0, seconds))
        except queue.Empty:
            now = time.monotonic()
        reading = min(makers(), key=lambda one: one.since, default=Reading(None, began))
        age = f"{now - reading.since:.0f} s"
        cause = f"no answer for {age} from {reading.what}" if reading.what else f"nothing was read for {age}"
        if now - max(began, reading.since) >= seconds:
            raise DataError(
                f"{what}: {cause}, which is more than data.stall_seconds. See whether its storage answers; the same "
                "command then goes on"
            )
        if now - began >= said * SAY_SECONDS:
            said += 1
            _log.warning("%s: not there after %.0f s: %s", what, now - began, cause)


def in_time(work: Callable[[], _Result], what: str, seconds: float, reads: Reads) -> _Result:
    """What `work` gives, which reads with `reads`. Raises as it does, and as `awaited` does."""
    answers: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name=what, daemon=True).start()
    result, error = awaited(answers, what, seconds, lambda: [reads.now])
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def said_by(say: Callable[[str], None]) -> Iterator[None]:
    """Has `say`, from any thread, say what is tried again and waited for in `lm.data`."""
    logger, handler = logging.getLogger(_LOGGER), _Handler(say)
    before = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)  # whatever other libraries make of the level of all
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before[0]
        logger.setLevel(before[1])


class _Handler(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())
