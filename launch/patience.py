"""Doing again what fails, with longer and longer waits: one failure ends no launch that nobody looks at."""

import time
from collections.abc import Callable
from typing import TypeVar

from lm.errors import LaunchError

T = TypeVar("T")

FIRST_SECONDS = 20.0
LONGEST_SECONDS = 300.0
GIVE_UP_SECONDS = 3600.0


class Patience:
    """Of one thing that is tried again until it works, or has failed for an hour."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self.begin()

    def begin(self) -> None:
        """What came before does not count."""
        self._wait = FIRST_SECONDS
        self._until: float | None = None

    def wait(self, error: LaunchError) -> bool:
        """Says what went wrong, and waits. False, without a wait: it has for too long."""
        now = time.monotonic()
        self._until = now + GIVE_UP_SECONDS if self._until is None else self._until
        if now >= self._until:
            return False
        self._say(f"{error}\ntrying again in {self._wait:.0f} s")
        time.sleep(self._wait)
        self._wait = min(2 * self._wait, LONGEST_SECONDS)
        return True


def patiently(do: Callable[[], T], say: Callable[[str], None]) -> T:
    """What `do` returns once it works. Raises the last of its LaunchErrors when that takes too long."""
    patience = Patience(say)
    while True:
        try:
            return do()
        except LaunchError as error:
            if not patience.wait(error):
                raise
