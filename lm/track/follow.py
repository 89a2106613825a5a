"""`lm track RUN`: once, or in a process that training starts, while it goes on and a little longer."""

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from lm.errors import ConfigError, StorageError
from lm.files import is_url, reason
from lm.track.send import Sending
from lm.train.run_directory import RunDirectory
from lm.train.trackers import END_SECONDS, TRACKED_AT, command, refuse_missing

POLL_SECONDS, POLL_URL_SECONDS = 5.0, 60.0
"""Between two looks at metrics.jsonl, on a disk and in a bucket, where training itself writes it every 30 s."""
LOCK_SECONDS = 60.0
"""For one that follows: until another, of an earlier start that was killed, has ended."""
_TICK_SECONDS = 0.5

Say = Callable[[str], None]


def catch_up(run: RunDirectory, name: str, say: Say) -> None:
    """Sends what has not arrived yet.

    Raises:
      ConfigError: the library is missing, another process sends it, or the run never started.
      StorageError: it could not be sent.
    """
    refuse_missing(name)
    try:
        with _alone(run, name, wait=0):
            sending = Sending(run, name)
            if url := sending.begin({}):
                say(TRACKED_AT + url)
            count = sending.send(over=True)
            sending.finish(otherwise="stopped")
    except ConfigError:
        raise
    except Exception as error:
        raise StorageError(_failed(run, name, error)) from error
    say(f"sent {count} logged steps to {name}")


def follow(run: RunDirectory, name: str, say: Say) -> int:
    """Sends what is new until there is a line on standard input, it ends, or the process that started this one does;
    then has the seconds to finish that the line says, or END_SECONDS. Returns an exit code."""
    os.nice(10)  # what trains goes first
    over = threading.Event()
    guard = threading.Thread(target=_guard, args=(run, name, say, over, os.getppid()), daemon=True)
    guard.start()
    try:
        with _alone(run, name, wait=LOCK_SECONDS):
            sending = Sending(run, name)
            if url := sending.begin({"commit": _commit()}):
                say(TRACKED_AT + url)
            while True:
                last = over.is_set()  # before it looks: then it sees all
                sending.send(over=last)
                if last:
                    break
                over.wait(POLL_URL_SECONDS if is_url(run.path) else POLL_SECONDS)
            sending.finish(otherwise="failed")
            return 0
    except Exception as error:
        traceback.print_exc()
        say(_failed(run, name, error) if over.is_set() else _short(error))
        return StorageError.exit_code


def _guard(run: RunDirectory, name: str, say: Say, over: threading.Event, parent: int) -> None:
    """Sets `over` in time, and ends the process when it does not end by itself: libraries wait for ever."""
    given = b""
    while os.getppid() == parent and not given.endswith(b"\n"):
        if select.select([sys.stdin], [], [], _TICK_SECONDS)[0]:
            if not (text := os.read(sys.stdin.fileno(), 100)):
                break
            given += text
    over.set()
    seconds = float(given or END_SECONDS)
    time.sleep(seconds)
    say(_failed(run, name, TimeoutError(f"it did not answer in {seconds:g} s")))
    os._exit(StorageError.exit_code)


def _failed(run: RunDirectory, name: str, error: Exception) -> str:
    count = -1
    with contextlib.suppress(Exception):
        count = Sending(run, name).missing()
    missing = f"{count} logged steps are" if count >= 0 else "all is"
    return f"{_short(error)}; {missing} not known to be there: `{command(run.path, name)}` sends what is missing"


def _short(error: Exception) -> str:
    return textwrap.shorten(reason(error), 160, placeholder=" …")


@contextlib.contextmanager
def _alone(run: RunDirectory, name: str, *, wait: float) -> Iterator[None]:
    """Only one process sends a run to a tracker; buckets, and file systems without locks, are not protected."""
    if is_url(run.path):
        yield
        return
    folder = Path(run.path) / "trackers"
    folder.mkdir(exist_ok=True)
    until = time.monotonic() + wait
    with open(folder / f".{name}.lock", "ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise ConfigError(f"{run.path} is being sent to {name} by another process") from None
                time.sleep(_TICK_SECONDS)
            except OSError:
                break
        yield


def _commit() -> str:
    """Of the code, where that is a checkout; with + when files differ."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else it lies in somebody else's
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
