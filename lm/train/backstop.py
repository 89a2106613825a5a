"""The end of a process in which no Python runs any more.

Something written in C may keep the interpreter's lock for ever; then no thread of Python can notice, nor end the
process. What can is the C library, which needs no such lock: a timer that is put off again and again, as long as
Python runs, and fires when it is not. These calls follow on each other then, all of them in C:

    the timer      alarm(…)    a second chance: after SIGSTOP and SIGCONT, however long, the timer has run out too, and
                               now Python gets the time to put it off
    SIGALRM        abort()
    SIGABRT        faulthandler writes the stacks of all threads to stderr, and lets the handler from before go on
    SIGABRT        _exit(6)    a handler is given the number of its signal, and that of SIGABRT is the exit code
                               of a hang

So other aborts end with 6 too: the way in which JAX and XLA end a process when they have lost another one. And what
crashes (SIGSEGV) shows where Python was.
"""

import contextlib
import ctypes
import faulthandler
import signal
import sys
import time

from lm.errors import HangError

CHANCE_SECONDS = 10
"""Between the timer and the end."""


class Backstop:
    """Ends the process, with the exit code of a HangError, when nobody puts it off. On Linux; elsewhere, nothing.

    One at a time: the handlers of SIGALRM and SIGABRT are its own until it is closed.
    """

    def __init__(self) -> None:
        self._timer: ctypes.c_void_p | None = None
        self._before: dict[int, int | None] = {}
        if not sys.platform.startswith("linux") or HangError.exit_code != signal.SIGABRT:
            return
        with contextlib.suppress(AttributeError, OSError):  # a C library without these calls
            self._libc = ctypes.CDLL(None)
            self._libc.signal.argtypes, self._libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
            faulthandler.disable()
            self._before[signal.SIGABRT] = self._libc.signal(signal.SIGABRT, self._call("_exit"))
            faulthandler.enable(file=_STDERR, all_threads=True)
            self._before[signal.SIGALRM] = self._libc.signal(signal.SIGALRM, self._call("abort"))
            event, timer = _Event(CHANCE_SECONDS, 0, _IN_A_THREAD, self._call("alarm")), ctypes.c_void_p()
            if self._libc.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) == 0:
                self._timer = timer

    def put_off(self, seconds: float) -> None:
        """From now on the process ends CHANCE_SECONDS after so many seconds; 0: never."""
        if self._timer is not None:
            whole = int(seconds)
            times = _Times((0, 0), (whole, int((seconds - whole) * 1e9)))
            self._libc.timer_settime(self._timer, 0, ctypes.byref(times), None)
            self._libc.alarm(0)

    def close(self) -> None:
        self.put_off(0)
        faulthandler.disable()
        for number, handler in self._before.items():
            self._libc.signal(number, handler)
        if self._timer is not None:
            self._libc.timer_delete(self._timer)

    def _call(self, name: str) -> int | None:
        return ctypes.cast(getattr(self._libc, name), ctypes.c_void_p).value


_STDERR = 2
_IN_A_THREAD = 2  # SIGEV_THREAD


class _Event(ctypes.Structure):
    """struct sigevent: the argument, a signal, how to notify, the function, attributes of its thread."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    )


class _Times(ctypes.Structure):
    """struct itimerspec: the interval, 0 for once, and the time from now; seconds and nanoseconds."""

    _fields_ = (("interval", ctypes.c_long * 2), ("first", ctypes.c_long * 2))
