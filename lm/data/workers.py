"""Jobs in several processes, which end when the one that started them does."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lm.errors import DataError

_Job = TypeVar("_Job")
_SECONDS = 0.5  # between looks at how far the processes are

_report: Callable[[int], None] = lambda done: None  # noqa: E731
_slots: Any = None


def report(done: int) -> None:
    """Says, from inside a job, how much of it is done."""
    _report(done)


def run(
    function: Callable[[_Job], Any],
    jobs: Sequence[_Job],
    workers: int,
    watch: Callable[[int], None] = lambda done: None,
) -> Generator[_Job, None, None]:
    """Yields each job when `function` has done it, in up to `workers` processes; 0 is one for each core.

    `watch` is told, now and then, the sum of what the jobs `report`. Ended early, it ends the processes at once.

    Raises:
        DataError: a process was killed.
    """
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from _here(function, jobs, watch)
        return
    others = set(multiprocessing.active_children())
    # spawn: the parent may run threads (of jax, of this module's callers) that a fork would not survive.
    context = multiprocessing.get_context("spawn")
    slots = context.RawArray("Q", len(jobs))  # each written by one process, so no lock that may die with its owner
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (slots,))
    try:
        futures = {pool.submit(_numbered, function, job, number): job for number, job in enumerate(jobs)}
        running = set(futures)
        while running:
            done, running = concurrent.futures.wait(running, _SECONDS, concurrent.futures.FIRST_COMPLETED)
            watch(sum(slots))
            for future in done:
                future.result()
                yield futures[future]
        pool.shutdown()
    except BrokenProcessPool:
        raise DataError(
            "one of its processes was killed, perhaps for lack of memory; the same command goes on, with a smaller "
            "data.workers if it was memory"
        ) from None
    finally:
        # A running job may take long, and one that is not finished is done again anyway.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)


def _here(
    function: Callable[[_Job], Any], jobs: Sequence[_Job], watch: Callable[[int], None]
) -> Generator[_Job, None, None]:
    global _report
    finished, current, before = 0, 0, _report

    def told(done: int) -> None:
        nonlocal current
        current = done
        watch(finished + current)

    try:
        for job in jobs:
            _report = told
            function(job)
            finished, current = finished + current, 0
            yield job
    finally:
        _report = before


def _numbered(function: Callable[[_Job], Any], job: _Job, number: int) -> None:
    global _report

    def told(done: int) -> None:
        _slots[number] = done

    _report = told
    function(job)  # what it gives stays here


def _start(slots: Any) -> None:
    global _slots
    _slots = slots
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; only the parent has to speak
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
