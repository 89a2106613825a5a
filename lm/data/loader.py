"""Batches made ahead, in a thread or in processes, for a loop that must neither wait for them nor hang with them.

The batch of a step depends on the step alone, so the steps are simply dealt to whoever is free; grain puts what comes
back in order and bounds how much is under way. The processes are not grain's own: those outlive a parent that was
killed, and one that hangs in a read hangs its parent when it closes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import queue
import signal
import threading
import time
import traceback
import types
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from lm.data.reading import Reading, Reads, awaited, said_by
from lm.errors import DataError

_AHEAD = 4
_TOLD_SECONDS = 1.0  # how often a process tells what it reads
_CLOSE_SECONDS = 1.0

_log = logging.getLogger(__name__)
_Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Of batches, as `lm.data.batches` has them. With processes it is pickled."""

    @property
    def reads(self) -> Reads: ...

    def batch(self, step: int, rows: Any) -> _Batch: ...


class Loader:
    """Iterates over (step, batch), in the order of the steps; `close` ends its thread and processes.

    Raises DataError also when nothing comes for `stall_seconds`: see `awaited`.
    """

    def __init__(
        self,
        source: Source,
        steps: Sequence[int],
        rows: slice | np.ndarray = slice(None),
        *,
        workers: int = 0,
        stall_seconds: float = math.inf,
    ) -> None:
        """Batches are the same with any number of `workers`, processes; 0: a thread, which is the fastest unless
        making batches takes longer than to copy them from process to process."""
        import grain  # takes a second, which looking at data should not

        self._source, self._steps, self._stall_seconds = source, steps, stall_seconds
        self._taken, self._closed = 0, False
        self._workers = [_Worker(source, rows) for _ in range(workers)]
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            idle.put(worker)

        def make(index: int) -> _Batch:
            if not workers:
                return source.batch(steps[int(index)], rows)
            worker = idle.get()
            try:
                return worker.batch(steps[int(index)])
            finally:
                idle.put(worker)

        # Each of grain's threads waits for a process. Without processes there is none of them: more threads are
        # slower, as the work is short numpy calls that hold the interpreter's lock, and none of them could be left
        # behind in a read that never ends, because the interpreter waits for a pool's threads when it exits.
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
        dataset = grain.MapDataset.range(len(steps)).map(make).to_iter_dataset(options)
        self._iterator: Any = iter(dataset)
        self._ready: queue.Queue[_Batch | BaseException] = queue.Queue(_AHEAD if not workers else 1)
        self._thread = threading.Thread(target=self._feed, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, _Batch]]:
        return self

    def __next__(self) -> tuple[int, _Batch]:
        if self._closed or self._taken == len(self._steps):
            raise StopIteration
        step = self._steps[self._taken]
        made = awaited(self._ready, f"batch {step}", self._stall_seconds, self._readings)
        if isinstance(made, BaseException):
            self.close()
            raise made
        self._taken += 1
        return step, made

    def close(self) -> None:
        """Returns within a second or so, whatever hangs."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        with contextlib.suppress(queue.Empty):  # makes room for a thread that waits for it
            while True:
                self._ready.get_nowait()
        self._thread.join(_CLOSE_SECONDS)
        self._iterator.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def _feed(self) -> None:
        try:
            for made in self._iterator:
                if self._closed:
                    return
                self._ready.put(made)
                if self._closed:
                    return
        except BaseException as error:
            self._ready.put(error)

    def _readings(self) -> list[Reading]:
        if not self._workers:
            return [self._source.reads.now]
        return [worker.reading for worker in self._workers if worker.reading is not None]


class _Worker:
    """A process that makes one batch at a time, seen from the parent. Started at once, and not waited for."""

    def __init__(self, source: Source, rows: slice | np.ndarray) -> None:
        self.reading: Reading | None = None
        """What it reads for the batch that it makes, as far as known; None: it makes none."""
        context = multiprocessing.get_context("spawn")  # a fork would not survive the threads that jax runs
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, source, rows), name="loader", daemon=True)
        # Signals reach all processes of a terminal or a job; the parent alone decides what follows from them.
        with _held(signal.SIGINT, signal.SIGTERM):
            self._process.start()
        theirs.close()
        # An interpreter that exits would ask the process to end, with a signal that is held, and wait for it.
        self._kill = multiprocessing.util.Finalize(self, _kill, (self._process,), exitpriority=10)

    def batch(self, step: int) -> _Batch:
        """Raises DataError, as making the batch does, and when the process is gone."""
        self.reading = Reading(None, time.monotonic())
        try:
            self._line.send(step)
            while True:
                match self._line.recv():
                    case "reading", what, since:
                        self.reading = Reading(what, since)
                    case "say", line:
                        _log.warning("%s", line)
                    case "batch", forms:
                        return {name: self._array(*form) for name, form in forms.items()}
                    case "error", text:
                        raise DataError(text)
                    case "bug", text:
                        raise RuntimeError(f"in a process of the loader:\n{text}")
        except (EOFError, OSError):
            raise DataError(
                "a process of the loader was killed, perhaps for lack of memory; the same command goes on, with a "
                "smaller data.loader_workers if it was memory"
            ) from None
        finally:
            self.reading = None

    def kill(self) -> None:
        """It holds nothing that would be lost."""
        self._kill()

    def _array(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        array = np.empty(shape, dtype)
        if array.size:
            self._line.recv_bytes_into(array.data.cast("B"))
        return array


def _kill(process: Any) -> None:
    process.kill()
    process.join()


@contextlib.contextmanager
def _held(*signals: int) -> Iterator[None]:
    multiprocessing.resource_tracker.ensure_running()  # else it starts with the process, and lets the signals go
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(line: multiprocessing.connection.Connection, source: Source, rows: slice | np.ndarray) -> None:
    """The life of a worker: a step comes, its batch goes, and now and then what is being read for it."""
    sending, busy = threading.Lock(), threading.Event()

    def send(*message: Any) -> None:
        with sending:
            line.send(message)

    def tell() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        while not multiprocessing.connection.wait([parent.sentinel], _TOLD_SECONDS):
            if busy.is_set():
                with contextlib.suppress(OSError):
                    send("reading", *source.reads.now)
        os._exit(1)  # the other thread may hang in a read

    threading.Thread(target=tell, daemon=True).start()
    with said_by(lambda text: send("say", text)), contextlib.suppress(EOFError, OSError):
        while True:
            step = line.recv()
            busy.set()
            try:
                made = source.batch(step, rows)
            except DataError as error:
                send("error", str(error))
                continue
            except Exception:
                send("bug", traceback.format_exc())
                continue
            finally:
                busy.clear()
            with sending:
                line.send(("batch", {name: (array.shape, array.dtype.str) for name, array in made.items()}))
                for array in made.values():
                    if array.size:
                        line.send_bytes(np.ascontiguousarray(array).data.cast("B"))
