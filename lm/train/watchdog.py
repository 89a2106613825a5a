"""A thread that ends the run when it makes no progress: with the stacks of all threads, and exit code 6 everywhere."""

import contextlib
import faulthandler
import math
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from etils import epath

from lm.errors import HangError
from lm.parallel.processes import ALONE, Processes
from lm.parallel.wire import exit_after, say
from lm.train.backstop import CHANCE_SECONDS, Backstop
from lm.train.config import WatchdogConfig

NOTE_SECONDS = 20.0
"""How often each process tells the primary, at least, in which phase it is."""
WRITE_SECONDS = 5.0
"""What it may take to write the stacks to the directory of the run, which may be what hangs."""
END_SECONDS = 30.0
"""The longest that the end may take."""
_NOTE = "phase"


class Watchdog:
    """Inside `with`, each phase of the run must begin anew within its limit, or the process ends.

    `directory` is that of the run, for `hang.<process>.txt`; `on_hang`, called in a thread of its own, is given what
    is printed. Time in which the process did not run (it was stopped, or the machine slept) does not count.
    """

    def __init__(
        self,
        config: WatchdogConfig,
        directory: str | os.PathLike[str],
        processes: Processes = ALONE,
        on_hang: Callable[[str], None] = lambda text: None,
    ):
        self._limits = {
            "start": config.start_seconds,
            "step": config.step_seconds,
            "evaluation": config.evaluation_seconds,
            "save": config.save_seconds,
        }
        shortest = min([limit for limit in self._limits.values() if limit], default=math.inf)
        self._tick = min(1.0, shortest / 10)
        self._note_seconds = min(NOTE_SECONDS, shortest / 6)
        self._file = epath.Path(directory) / f"hang.{processes.index}.txt"
        self._processes, self._on_hang = processes, on_hang
        self._now: tuple[str, int | None] = "start", None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def phase(self, name: str, step: int | None = None) -> None:
        """Begins a phase, maybe the same as before: start, step, evaluation, save, or one without a limit."""
        self._now = name, step  # another tuple each time: this is what the thread looks at

    @property
    def now(self) -> tuple[str, int | None]:
        """The phase, and its step. From any thread."""
        return self._now

    def __enter__(self) -> Self:
        self._backstop = Backstop()
        self._processes.explain_hangs(self._explain)
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._closed.set()
        self._thread.join()
        self._processes.explain_hangs(self._processes.missing)
        self._backstop.close()

    def _run(self) -> None:
        try:
            self._watch()
        finally:  # a bug here must not look like a hang
            self._backstop.put_off(0)

    def _watch(self) -> None:
        phase, age, noted, before = self._now, 0.0, -math.inf, time.monotonic()
        while True:
            limit = self._limits.get(phase[0], 0.0)
            self._backstop.put_off(limit and max(limit - age, 0.0) + CHANCE_SECONDS)
            if limit and age >= limit:
                self._end(phase, age, limit)
            if before - noted >= self._note_seconds:
                self._processes.note(_NOTE, phase)
                noted = before
            if self._closed.wait(self._tick):
                return
            now = time.monotonic()
            age += min(now - before, 2 * self._tick)  # what is longer was no time of this process
            before = now
            if self._now is not phase:
                phase, age = self._now, 0.0

    def _end(self, phase: tuple[str, int | None], age: float, limit: float) -> None:
        exit_after(END_SECONDS, HangError.exit_code)
        self._backstop.put_off(END_SECONDS)
        found = stacks()
        say(found.rstrip())
        text = (
            f"no progress for {age:.0f} s in {place(phase)}, more than watchdog.{phase[0]}_seconds = {limit:g}; the "
            f"stacks of all threads are in {self._file}; the same command goes on from the newest checkpoint"
        )
        text = "; ".join([text, *self._explain()])
        writer = threading.Thread(target=self._write, args=(text, found), daemon=True)
        writer.start()
        writer.join(WRITE_SECONDS)
        self._processes.end(HangError(text))

    def _write(self, text: str, found: str) -> None:
        with contextlib.suppress(Exception):  # storage libraries raise classes of their own
            self._file.write_text(f"{text}\n\n{found}")
        self._on_hang(text)

    def _explain(self) -> list[str]:
        processes = self._processes
        notes = processes.notes(_NOTE)
        return [*suspects(notes, time.monotonic(), 3 * self._note_seconds, processes.name), *processes.missing()]


def stacks() -> str:
    """Of all threads, by name, as far as the process has come in each."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        text = file.read().decode(errors="replace")
    for thread in threading.enumerate():
        text = text.replace(f"0x{thread.ident or 0:016x}", repr(thread.name))
    return text


def place(phase: Sequence[Any]) -> str:
    name, step = phase
    return name if step is None else f"{name} {step}"


def suspects(
    notes: Mapping[int, tuple[float, Sequence[Any]]], now: float, silence: float, name: Callable[[int], str]
) -> list[str]:
    """Who may hold all up: those not heard of for `silence` seconds, and those few that are not as far as the others.

    `notes`: for each process when it was heard of, by the clock of `now`, and its phase and step.
    """
    silent = [index for index, (when, _) in notes.items() if now - when > silence]
    lines = [
        f"{name(index)} was last heard {now - notes[index][0]:.0f} s ago, in {place(notes[index][1])}"
        for index in sorted(silent, key=lambda index: notes[index][0])
    ]
    heard = {index: phase for index, (_, phase) in notes.items() if index not in silent}
    steps = [-1 if step is None else step for _, step in heard.values()]
    usual = statistics.median_low(steps) if steps else -1
    behind = [index for (index, phase), step in zip(heard.items(), steps, strict=True) if step < usual]
    lines += [f"{name(index)} is still in {place(heard[index])}" for index in behind]
    return lines[:3] + ([f"and {len(lines) - 3} more"] if len(lines) > 3 else [])
