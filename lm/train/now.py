"""now.json: what a run is doing at this moment, for whoever looks at it from this machine or another.

The journal says what was, once a minute. What is now is told by a thread of its own, so that it costs the training
thread nothing and storage that hangs holds up nobody. The file also is the sign of life of a run whose process cannot
be seen, on another machine or in a bucket: while the process lives, it is never older than a few times its `every`.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from etils import epath

from lm.files import UPLOAD_SECONDS, is_url

WORDS = {
    "step": "training",
    "replay": "training steps again that were done before",
    "input": "waiting for the next batch",
    "save": "saving",
    "evaluation": "evaluating",
    "compile": "compiling",
    "restore": "restoring",
    "start": "starting",
    "data": "building data",
    "profile": "writing a trace",
    "other": "closing down",
}
"""What a person is told of `doing`."""
LOOK_SECONDS = 1.0
WRITE_SECONDS = 5.0
"""Between two writes, but where something else begins; in a bucket always UPLOAD_SECONDS, as for all that is written
there again and again."""
CLOSE_SECONDS = 5.0
"""What the end of a run waits for storage that hangs."""


class Now:
    """Inside `with`, keeps the file as it should be; a run that ends by itself leaves none behind.

        start        the id of this start in the journal
        pid, host
        doing        what `look` gives first: a cause of lm/train/goodput.py, or "data" while it is built
        done         and second: finished steps
        since, time  when both became so, and when this was written, in seconds since 1970
        every        seconds between two writes, at most

    A write that fails is let pass: it harms nothing but what somebody who looks can see. Without a path nothing is
    written: for processes of a run that are not its primary.

    Args:
      look: called from another thread, must not wait.
    """

    def __init__(self, path: str | os.PathLike[str] | None, *, start: str, look: Callable[[], tuple[str, int]]):
        self._path = None if path is None else epath.Path(path)
        self._start, self._look = start, look
        self._every = UPLOAD_SECONDS if path is not None and is_url(path) else WRITE_SECONDS
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="now", daemon=True)

    def __enter__(self) -> Self:
        if self._path is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._closed.set()
        if self._path is not None:
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        assert self._path is not None
        seen, since, due, told = self._look(), time.time(), time.monotonic(), ""
        while True:
            # Most runs wait for a batch now and then, which is no news.
            news = told not in ("", seen[0]) and {told, seen[0]} != {"step", "input"}
            if (news and not is_url(self._path)) or time.monotonic() >= due:
                self._write(self._path, self._facts(seen, since))
                due, told = time.monotonic() + self._every, seen[0]
            if self._closed.wait(LOOK_SECONDS):
                break
            now = self._look()
            if now != seen:
                seen, since = now, time.time()
        with contextlib.suppress(Exception):
            self._path.unlink(missing_ok=True)

    def _facts(self, seen: tuple[str, int], since: float) -> dict[str, Any]:
        doing, done = seen
        return {
            "start": self._start,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "doing": doing,
            "done": done,
            "since": round(since, 3),
            "time": round(time.time(), 3),
            "every": self._every,
        }

    def _write(self, path: epath.Path, facts: dict[str, Any]) -> None:
        contents = json.dumps(facts).encode() + b"\n"
        with contextlib.suppress(Exception):  # storage libraries raise classes of their own beside OSError
            if is_url(path):
                path.write_bytes(contents)
            else:  # whole or not at all, but not worth waiting for the disk
                temporary = path.with_name(f".{path.name}.tmp")
                temporary.write_bytes(contents)
                temporary.replace(path)


def read_now(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `Now` has written there last; None where there is nothing, or nothing that can be read."""
    try:
        facts = json.loads(epath.Path(path).read_bytes())
        numbers = [facts[name] for name in ("pid", "done", "since", "time", "every")]
        words = [facts[name] for name in ("start", "host", "doing")]
    except Exception:  # storage libraries raise classes of their own beside OSError
        return None
    sound = all(isinstance(x, int | float) for x in numbers) and all(isinstance(x, str) for x in words)
    return facts if sound else None
