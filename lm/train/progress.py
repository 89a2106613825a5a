"""What a person sees of a run while it runs, and log.txt, which keeps it."""

import contextlib
import itertools
import os
import re
import statistics
import threading
from collections import deque
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Self, TextIO

from lm.files import AppendOnlyFile
from lm.train.now import WORDS

REDRAW_SECONDS = 0.1
PLAIN_SECONDS, PLAIN_MOST_SECONDS, PLAIN_SHARE = 10.0, 60.0, 0.01
"""Between plain lines: at least, at most, and in between this share of the time since the first."""
WATCH_SECONDS = 1.0
SHORT_SECONDS, OTHER_SHORT_SECONDS = {"step": 10.0, "replay": 10.0}, 2.0
"""What is under way for less than that is not worth a word."""
RECENT_UPDATES = 100  # what the time left is judged by


class Progress:
    """One live line, rewritten in place, on a terminal; elsewhere a plain line now and then.

        step 120/600  loss 3.214  2.31 bits/byte  12.3k tokens/s  41% MFU  1m42s left

    Plain lines come with the first update, then every PLAIN_SECONDS, later more rarely, and with the last update.
    They, and all that is said, also go to `log`. Control characters in what is said are written out (as in
    `\\x1b`): text that a model generated must not drive a terminal.

    A stream that fails (a closed pipe, a terminal that is gone) is given up; the run and its log go on.
    All methods may be called from any thread.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None, log: str | os.PathLike[str] | None = None):
        self._total_steps = total_steps
        self._stream = stream
        self._live = _is_terminal(stream)
        self._log = None if log is None else AppendOnlyFile(log, self._show)
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_UPDATES)
        self._latest: tuple[int, Mapping[str, float]] | None = None
        self._drawn_at = self._plain_at = -float("inf")
        self._first_at: float | None = None
        self._doing = ""  # besides steps
        self._closed = threading.Event()
        self._owed = False  # the last update is not in a plain line yet
        self._mutex = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """After `step` finished steps. The line shows the main `values`, named as in metrics.jsonl."""
        with self._mutex:
            now = monotonic()
            self._recent.append((now, step))
            self._latest = (step, values)
            self._owed = True
            self._doing = ""
            last = step == self._total_steps
            self._first_at = self._first_at or now
            pause = min(max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._first_at)), PLAIN_MOST_SECONDS)
            if last or now - self._plain_at >= pause:
                self._plain_at = now
                self._write_plain_line()
            if self._live and (last or now - self._drawn_at >= REDRAW_SECONDS):
                self._drawn_at = now
                self._write("\r" + self._live_line() + _CLEAR)

    def say(self, message: str) -> None:
        """Prints whole lines, above the live line, and logs them."""
        with self._mutex:
            self._show(message)
            self._keep(message)

    def watch(self, look: Callable[[], tuple[str, int]]) -> None:
        """From now on the live line, also before the first update, tells what is under way and for how long.

        `look` gives what lm/train/now.py calls `doing` and `done`; it is called from another thread, until `close`.
        """
        if self._live:
            threading.Thread(target=self._watch, args=(look,), name="progress", daemon=True).start()

    def close(self) -> None:
        """Leaves the last state as a whole line. Something can still be said afterwards."""
        self._closed.set()
        with self._mutex:
            if self._live and self._doing:
                self._write("\r" + _CLEAR)
            self._doing = ""
            if self._owed:
                self._write_plain_line()
            if self._live and self._latest:
                self._write("\r" + self._live_line() + _CLEAR + "\n")
            self._latest = None
            if self._log is not None:
                self._log.close()

    def _watch(self, look: Callable[[], tuple[str, int]]) -> None:
        seen, since = look(), monotonic()
        while not self._closed.wait(WATCH_SECONDS):
            if (now := look()) != seen:
                seen, since = now, monotonic()
            spent = monotonic() - since
            short = spent < SHORT_SECONDS.get(seen[0], OTHER_SHORT_SECONDS)
            with self._mutex:
                if self._live and not self._closed.is_set():
                    before, self._doing = self._doing, "" if short else f"{WORDS[seen[0]]} for {human_seconds(spent)}"
                    if self._latest or before or self._doing:
                        self._write("\r" + self._live_line() + _CLEAR)

    def _write_plain_line(self) -> None:
        self._owed = False
        line = "  ".join(self._parts())
        if not self._live:
            self._write(line + "\n")
        self._keep(line)

    def _show(self, message: str) -> None:
        drawn = self._live and (self._latest or self._doing)
        above, below = ("\r" + _CLEAR, self._live_line()) if drawn else ("", "")
        self._write(above + printable(message) + "\n" + below)

    def _keep(self, message: str) -> None:
        if self._log is not None:
            self._log.append(printable(message).encode(errors="replace") + b"\n")

    def _live_line(self) -> str:
        parts = [*self._parts(), self._doing] if self._doing else self._parts()
        return _fit(parts, _columns(self._stream) - 1)  # a full last column would wrap

    def _parts(self) -> list[str]:
        if self._latest is None:
            return []
        step, values = self._latest
        parts = [f"step {step}/{self._total_steps}"]
        if "loss" in values:
            parts.append(f"loss {values['loss']:.3f}")
        if "bits_per_byte" in values:
            parts.append(f"{values['bits_per_byte']:.2f} bits/byte")
        if "tokens_per_second" in values:
            parts.append(f"{human_count(values['tokens_per_second'])} tokens/s")
        if "mfu" in values:
            parts.append(f"{values['mfu']:.0%} MFU")
        seconds_left = self._seconds_left(step)
        if seconds_left is not None:
            parts.append(f"{human_seconds(seconds_left)} left")
        return parts

    def _seconds_left(self, step: int) -> float | None:
        paces = [
            (after - before) / (later - earlier)
            for (before, earlier), (after, later) in itertools.pairwise(self._recent)
            if later > earlier
        ]
        if not paces or step >= self._total_steps:
            return None
        # The cap keeps evaluations and saves in the mean, and a suspended laptop out of it.
        cap = 10 * statistics.median(paces)
        return (self._total_steps - step) * statistics.fmean(min(pace, cap) for pace in paces)

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, errors="replace").decode(encoding))
            self._stream.flush()
        except (OSError, ValueError):
            _silence(self._stream)
            self._stream, self._live = None, False


def human_seconds(seconds: float) -> str:
    """A duration in at most two units: 0.3s, 42s, 1m42s, 2h05m, 3d04h."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02}h"


def human_count(count: float) -> str:
    """A number to three digits: 7, 950, 0.25, 12.3k, 4.56M, 15.0T."""
    return "".join(_three_digits(count, ("k", "M", "B", "T")))


def human_bytes(count: float) -> str:
    """Bytes to three digits, in powers of 1000: 950 B, 1.23 GB."""
    number, unit = _three_digits(count, ("k", "M", "G", "T"))
    return f"{number} {unit}B"


def printable(message: str) -> str:
    """With its control characters, but for tabs and ends of lines, written out (as in `\\x1b`)."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", message)


def _three_digits(count: float, units: tuple[str, ...]) -> tuple[str, str]:
    unit = ""
    for larger in units:
        if abs(count) < 999.5:
            break
        count, unit = count / 1000, larger
    if not unit and count == round(count):
        return f"{count:.0f}", unit
    decimals = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
    return f"{count:.{decimals}f}", unit


_CLEAR = "\x1b[K"  # to the end of the line
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_DROP_FIRST = ("MFU", "bits/byte", "tokens/s", "loss", "left", " for ")  # on a narrow terminal; the step always stays


def _fit(parts: list[str], width: int) -> str:
    for name in _DROP_FIRST:
        if len("  ".join(parts)) <= width:
            break
        parts = [part for part in parts if name not in part]
    return "  ".join(parts)[: max(width, 0)]


def _is_terminal(stream: TextIO | None) -> bool:
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def _columns(stream: TextIO | None) -> int:
    try:
        return (os.get_terminal_size(stream.fileno()).columns if stream else 0) or 80
    except (OSError, ValueError):
        return 80


def _silence(stream: TextIO) -> None:
    """What is still in the buffer of a broken stdout would fail again at exit, and change the exit code."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
