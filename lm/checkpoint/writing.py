"""The arrays of a state on their way to storage, as Orbax writes them.

What Orbax's checkpointers do around that is not wanted here: they ask storage, and let the devices exchange values,
before they return to training, and their barriers outlast a failure by minutes. So this takes the one part that copies
and writes, and tells it by itself when it may write.
"""

import asyncio
import functools
import logging
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Self

import orbax.checkpoint as ocp
from etils import epath

from lm.checkpoint.folder import absolute
from lm.files import is_url

# Orbax logs a page for each failure that it also raises, and does not look at those after the first, of which asyncio
# then logs a page each; what is raised is reported here in a line.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)
_LATE = re.compile("exception was never retrieved|Task was destroyed but it is pending")
logging.getLogger("asyncio").addFilter(lambda record: not _LATE.search(record.getMessage()))


def _silence_late_ends(before: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """When one array cannot be written or read, Orbax stops waiting for the others. Each of these then finds its event
    loop closed, or is closed itself, and says so from wherever it is, in the middle of whatever is printed."""

    def hook(problem: Any) -> None:
        code = problem.exc_traceback and problem.exc_traceback.tb_frame.f_code
        late = str(problem.exc_value) == "Event loop is closed" and code and code.co_name == "call_soon_threadsafe"
        if not late and not (code and "/orbax/checkpoint/" in code.co_filename):
            before(problem)

    sys.unraisablehook = hook


_silence_late_ends()


async def _await_path_creation(self: Any) -> None:
    """In place of Orbax's, which looks twice at what another of its threads may have replaced in between."""
    parent = self._parent_dir
    if isinstance(parent, _Later):
        there = await parent.await_creation()
        self._path = there / self.name
        self._parent_dir = there  # last: this is what the other thread looks at


ocp.type_handlers.ParamInfo.await_path_creation = _await_path_creation


COMMITTED = "commit_success.txt"


class Writing:
    """One save of this process's part of the arrays.

    Constructing it copies what has to be copied, and returns when the arrays may be donated: on CPU devices at once,
    since their buffers are held and donated ones replaced. Storage is not touched before `begin`.
    """

    def __init__(self, path: epath.Path, state: Any):
        self._path = _Later(absolute(path))
        self._futures = asyncio.run(_handler().async_save(self._path, args=ocp.args.PyTreeSave(state)))

    def begin(self) -> None:
        """Writes; the folder is there."""
        self._path.there.set_result(None)

    def abandon(self) -> None:
        """Nothing is written, unless it is already."""
        if not self._path.there.done():
            self._path.there.set_exception(RuntimeError("the save was given up"))

    def wait(self, seconds: float | None = None) -> None:
        """Returns when this part is written. Raises TimeoutError before, and what made it fail."""
        for future in self._futures:
            future.result(timeout=seconds)

    def finish(self) -> None:
        """To be called by one of the processes, when all have written."""
        _handler().finalize(self._path.path)
        if is_url(self._path.path):  # without it Orbax takes what is in a gs:// bucket for a save that was not ended
            (self._path.path / COMMITTED).write_bytes(b"")


class _Later:
    """A path that must not be written to yet: Orbax's protocol PathAwaitingCreation."""

    def __init__(self, path: epath.Path, there: Future[None] | None = None):
        self.path = path
        self.there: Future[None] = there or Future()

    def __truediv__(self, name: str) -> Self:
        return type(self)(self.path / name, self.there)

    async def await_creation(self) -> epath.Path:
        while not self.there.done():  # from threads with event loops of their own
            await asyncio.sleep(0.005)
        self.there.result()
        return self.path


@functools.cache
def _handler() -> ocp.PyTreeCheckpointHandler:
    # Weights hardly compress, and it takes five times as long.
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
