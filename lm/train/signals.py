"""SIGTERM and Ctrl-C ask a run to stop: during training at the next step, before it at once."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lm.errors import Stopped

SAME_SECONDS = 10.0
"""In which a second SIGTERM is the first one again: a scheduler sends it to all processes of a job, and a supervisor
among them passes it on."""


class StopRequest:
    """What the signal handler and the training loop share."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._at = 0.0
        self.deferred = False
        """Set while the loop runs: it looks at `received` between steps, saves, and stops by itself."""

    def handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.received == "SIGTERM" and time.monotonic() - self._at < SAME_SECONDS:
            return
        again, self.received, self._at = self.received is not None, name, time.monotonic()
        if again:  # someone is in a hurry: end as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.deferred:
            raise Stopped(f"stopped by {self.received} before the first new step; the same command starts again")


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Routes SIGTERM and SIGINT to the StopRequest that it yields."""
    request = StopRequest()
    before = {number: signal.signal(number, request.handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
