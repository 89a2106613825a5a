"""Weights & Biases and MLflow, kept at a distance: each is fed by a process of its own, from metrics.jsonl.

So a tracker that is slow, down or over quota costs training nothing, a crash of its library ends no run, and what it
missed is sent later: `lm track` does that.
"""

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from etils import epath

from lm.errors import ConfigError, Stopped
from lm.files import is_url, reason

END_SECONDS, STOP_SECONDS = 30.0, 5.0
"""What a process has at the end of training to send the rest; when training is stopped, somebody is in a hurry."""
AGAIN_SECONDS = (15.0, 900.0)
"""Before one that has failed is started again: the first time, doubled with each, and at most."""
TRACKED_AT = "tracked at "
_KILL_SECONDS = 5.0

Say = Callable[[str], None]


class Trackers:
    """The processes that send a run to trackers while it is trained, and then are let end.

    Nothing that happens to them raises. What they have to say is said once.

    Raises:
      ConfigError: the library of a tracker is not installed.
    """

    def __init__(self, names: Sequence[str]):
        for name in names:
            refuse_missing(name)
        self._names = names
        self._feeders: list[_Feeder] = []

    def follow(self, run: epath.Path, say: Say) -> None:
        """From now on. The run must have its config.json, and a start in its journal."""
        self._feeders = [_Feeder(run, name, say) for name in self._names]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: TracebackType | None) -> None:
        seconds = STOP_SECONDS if isinstance(error, Stopped) else END_SECONDS
        for feeder in self._feeders:
            feeder.close(seconds)
        until = time.monotonic() + seconds + _KILL_SECONDS
        for feeder in self._feeders:
            feeder.end(until)


def refuse_missing(name: str) -> None:
    """Raises ConfigError when the library of a tracker is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # a folder of that name, as wandb makes one
        raise ConfigError(f"{name} is not installed here: pip install 'lm[{name}]'")
    here = importlib.util.find_spec("sqlalchemy") is not None  # what mlflow's own default, a database, needs
    if name == "mlflow" and not here and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ConfigError("mlflow is not told where to: set MLFLOW_TRACKING_URI to that of a server")


def command(run: str | os.PathLike[str], name: str) -> str:
    """What sends what a tracker has missed."""
    return shlex.join(["lm", "track", os.fspath(run), "--to", name])


class _Feeder:
    """One process at a time, started again when it fails; and a thread that hears what it says."""

    def __init__(self, run: epath.Path, name: str, say: Say):
        self._run, self._name, self._say = run, name, say
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._seconds = END_SECONDS
        self._failed, self._tracked_at = False, ""
        here = os.path.join(tempfile.gettempdir(), f"lm-track-{os.getpid()}")  # a library writes only to a local file
        folder = here if is_url(run) else os.path.join(run, "trackers")
        self._log = os.path.join(folder, f"{name}.log")
        self._thread = threading.Thread(target=self._feed, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Lets it finish within so many seconds."""
        with self._mutex:
            self._seconds = seconds
            self._closing.set()
            self._let_finish()

    def end(self, until: float) -> None:
        """Waits for its end, and makes it end by then (time.monotonic)."""
        self._thread.join(max(until - time.monotonic(), 0))
        with self._mutex:
            if self._thread.is_alive() and self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._thread.join(_KILL_SECONDS)

    def _feed(self) -> None:
        pause, longest = AGAIN_SECONDS
        while True:
            began = time.monotonic()
            problem = self._one()
            if self._closing.is_set():
                if problem:
                    self._say(f"{self._name}: {problem}")
                return
            if not self._failed:
                self._failed = True
                self._say(f"{self._name}: {problem}; training goes on, and it is tried again, see {self._log}")
            if time.monotonic() - began > longest:
                pause = AGAIN_SECONDS[0]
            self._closing.wait(pause)  # and then once more, to finish
            pause = min(2 * pause, longest)

    def _one(self) -> str:
        """From the start to the end of one process; what was wrong with it."""
        problem = ""
        try:
            with self._mutex:
                self._process = process = self._start()
                if self._closing.is_set():
                    self._let_finish()
            assert process.stdout is not None
            with process.stdout:
                for raw in process.stdout:
                    line = raw.decode(errors="replace").rstrip()
                    if not line.startswith(TRACKED_AT):
                        problem = line
                    elif line != self._tracked_at:
                        self._tracked_at = line
                        self._say(f"{self._name}: {line}")
            code = process.wait()
        except OSError as error:
            return f"cannot be started: {reason(error)}"
        if problem or (code == 0 and self._closing.is_set()):
            return problem
        problem = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        more = f"; `{command(self._run, self._name)}` sends what is missing" if self._closing.is_set() else ""
        return problem + more

    def _start(self) -> subprocess.Popen[bytes]:
        os.makedirs(os.path.dirname(self._log), exist_ok=True)
        arguments = [sys.executable, "-m", "lm", "track", os.fspath(self._run), "--to", self._name, "--follow"]
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C on a terminal is for training
            )

    def _let_finish(self) -> None:
        """Says how long it has, at which it sends the rest and ends; as does the end of its standard input."""
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):  # it has ended already
                self._process.stdin.write(b"%g\n" % self._seconds)
                self._process.stdin.close()
