"""What is printed while work goes on: on a terminal one line that is rewritten, elsewhere a line now and then."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

Progress = Callable[[str], None]

_SECONDS = 10.0  # between lines that stay
_LIVE_SECONDS = 0.5


class Terminal:
    """Prints lines; what `live` prints is rewritten by what comes next."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._length = 0

    def __call__(self, line: str) -> None:
        self._write(f"{line:<{self._length}}\n")
        self._length = 0

    def live(self, line: str) -> None:
        line = line[: shutil.get_terminal_size().columns - 1]  # of one that wraps, only the last row is rewritten
        self._write(line)
        self._length = len(line)

    def _write(self, line: str) -> None:
        self._stream.write(f"\r{line:<{self._length}}" if self._length else line)
        self._stream.flush()


class Named:
    """Puts a name before each line."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress
        if (live := _live(progress)) is not None:
            self.live = lambda line: live(f"{name}: {line}")

    def __call__(self, line: str) -> None:
        self._progress(f"{self._name}: {line}")


class Meter:
    """How far a pass over `total` bytes is, with its rate and the time that is left."""

    def __init__(self, doing: str, total: int, progress: Progress) -> None:
        live = _live(progress)
        self._doing, self._total = doing, total
        self._progress, self._say = progress, live or progress
        self._every = _LIVE_SECONDS if live else _SECONDS
        self._started = self._last = time.monotonic()
        self._done = 0

    def __call__(self, done: int) -> None:
        """Says so, if it is time to."""
        self._done = min(done, self._total)
        now = time.monotonic()
        if now < self._last + self._every:
            return
        self._last = now
        rate = self._done / (now - self._started)
        left = f"{time_left((self._total - self._done) / rate)} left" if rate else "waiting for the first of it"
        self._say(f"{self._doing}: {_amount(self._done, self._total)}, {rate / 1e6:.1f} MB/s, {left}")

    def finish(self) -> None:
        """Says what it came to."""
        seconds = time.monotonic() - self._started
        self._progress(
            f"{self._doing}: {_amount(self._total, self._total)} in {time_left(seconds)}, "
            f"{self._total / max(seconds, 1e-9) / 1e6:.1f} MB/s"
        )


def time_left(seconds: float) -> str:
    """As in 42 s, 3 min 5 s, 2 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole // 60 % 60} min"


def _amount(done: int, total: int) -> str:
    unit, name = (1e9, "GB") if total >= 1e10 else (1e6, "MB")
    return f"{total / unit:.1f} {name}" if done == total else f"{done / unit:.1f} of {total / unit:.1f} {name}"


def _live(progress: Progress) -> Progress | None:
    return getattr(progress, "live", None)
