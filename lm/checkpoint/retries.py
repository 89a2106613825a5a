"""When a save that was skipped or failed is made up for, when to give up, and what is counted of saves."""

import time

from lm.errors import StorageError

FIRST_SECONDS, LONGEST_SECONDS = 10.0, 600.0
"""From a save that failed to the next one: doubled each time, up to the longest."""


class Retries:
    """Of one process; told by the thread that trains (`started`, `skipped`, `blocked`) and by the one that saves."""

    def __init__(self, give_up_seconds: float):
        self._give_up_seconds = give_up_seconds
        self._saves = self._failed = self._skipped = 0
        self._blocked_seconds = self._seconds = 0.0
        self._started = 0.0
        self._in_a_row = 0  # that failed
        self._again: tuple[float, str] | None = None  # when, and why
        self._owed = False  # since a save was skipped
        self._tried_since: float | None = None
        self._problem = ""
        self._good: float | None = None

    def started(self) -> None:
        self._started = time.monotonic()
        self._owed = False
        if self._tried_since is None:
            self._tried_since, self._problem = self._started, "a save is still going"

    def skipped(self) -> bool:
        """Whether it is the first one in a row."""
        self._skipped += 1
        first, self._owed = not self._owed, True
        return first

    def blocked(self, seconds: float) -> None:
        """How long training waited for a save to start."""
        self._blocked_seconds = seconds

    def succeeded(self) -> None:
        self._saves += 1
        self._good = time.monotonic()
        self._seconds = self._good - self._started
        self._in_a_row, self._again, self._tried_since = 0, None, None

    def failed(self, problem: str) -> float:
        """For how long nothing is tried."""
        self._failed += 1
        self._problem = problem
        seconds = min(FIRST_SECONDS * 2.0**self._in_a_row, LONGEST_SECONDS)
        self._in_a_row += 1
        self._again = time.monotonic() + seconds, f"a save failed: {problem}"
        return seconds

    def refused(self) -> None:
        """It was the state that was not good enough: storage is not to blame."""
        self._skipped += 1
        if self._tried_since == self._started:
            self._tried_since = None
        self._again = time.monotonic() + FIRST_SECONDS, "the state that was due was not good"

    def due(self) -> str | None:
        """Why to save now; while no save is going."""
        if self._owed:
            return "a save was skipped"
        return self._again[1] if self._again and time.monotonic() >= self._again[0] else None

    def left(self) -> float | None:
        """Seconds that the save that is going may still take; None: any time."""
        return max(self._started + self._give_up_seconds - time.monotonic(), 0.0) if self._give_up_seconds else None

    def check(self) -> None:
        """Raises StorageError when none was good for `give_up_seconds`, although they were tried."""
        since, limit = self._tried_since, self._give_up_seconds
        if limit and since is not None and time.monotonic() - since > limit:
            raise StorageError(
                f"no checkpoint could be made for {limit:.0f} s (checkpoint.give_up_seconds): {self._problem}"
            )

    def counts(self) -> dict[str, float]:
        age = {} if self._good is None else {"checkpoint_age_seconds": time.monotonic() - self._good}
        return {
            "saves": self._saves,
            "saves_failed": self._failed,
            "saves_skipped": self._skipped,
            "save_blocked_seconds": self._blocked_seconds,
            "save_seconds": self._seconds,
            **age,
        }
