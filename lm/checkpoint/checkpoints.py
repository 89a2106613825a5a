"""Checkpoints: the whole state of a run at a step, saved beside training and trusted only after a check.

<directory>/<step>/state/           the arrays, as Orbax writes them
                   config.json, …   attachments: small files that make the checkpoint usable alone
                   manifest.json    the digest of the state and the checksum of every file, written last

The manifest is the commit marker, on a local disk as in a bucket: a folder without one is what a killed save,
or a killed removal, left behind.

Training waits for the copy of the arrays, and for nothing else: storage is only ever touched by a thread of its own,
which may be slow, fail and be tried again, or hang.

In a run of many processes each one writes the arrays that its devices hold, reads back its share of all files, and
hears from the primary what is saved, or restored; a step that failed in one of them has failed in all. That all reach
the same directory is for the user to see to.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, TypeVar

from etils import epath

from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.digest import prepare_digest, start_digest
from lm.checkpoint.ending import end_without
from lm.checkpoint.folder import STATE, half_written, names_set_aside, remove, saved_steps, set_aside, to_prune
from lm.checkpoint.listing import list_checkpoints as list_checkpoints
from lm.checkpoint.listing import read_attachment as read_attachment
from lm.checkpoint.manifest import NAME as MANIFEST
from lm.checkpoint.manifest import (
    BadCheckpoint,
    FileChecksum,
    Manifest,
    StateDigest,
    UnreadableCheckpoint,
    file_sizes,
    shares,
)
from lm.checkpoint.restoring import load
from lm.checkpoint.retries import Retries
from lm.checkpoint.together import together
from lm.checkpoint.writing import Writing
from lm.errors import LostProcessError, StorageError, some
from lm.files import reason, write_atomically
from lm.parallel.processes import ALONE, Processes

T = TypeVar("T")


class Checkpoints:
    """Saves and restores the state of one run. Constructing it changes nothing on disk.

    `attachments` are stored with every checkpoint, by file name. `report` is given one message for each
    thing that the user should know; it is called from the thread that saves as well, in the primary process only.
    `fresh` gives the state at step 0, for what older checkpoints lack of it; it is traced.
    With several `processes`, all of them call the same methods in the same order, but for `retry_due` and `check`.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        config: CheckpointConfig,
        attachments: Mapping[str, bytes],
        report: Callable[[str], None],
        processes: Processes = ALONE,
        fresh: Callable[[], Any] | None = None,
    ):
        for name in attachments:
            if name in (STATE, MANIFEST) or "/" in name:
                raise ValueError(f"{name!r} cannot be the file name of an attachment")
        self.last_good: int | None = None  # step that was committed or restored last
        self._directory = epath.Path(directory)
        self._config = config
        self._attachments = dict(attachments)
        self._report = report if processes.primary else lambda _: None
        self._processes = processes
        self._fresh = fresh
        self._retries = Retries(config.give_up_seconds)
        self._saving: _Saving | None = None
        self._attempt = 0
        self._swept = False

    def attach(self, name: str, contents: bytes) -> None:
        """Another attachment, of the checkpoints from now on."""
        self._attachments = {**self._attachments, name: contents}

    @property
    def attachments(self) -> Mapping[str, bytes]:
        return self._attachments

    def compile(self, abstract_state: Any) -> None:
        """Compiles what saving needs, so that no save has to."""
        prepare_digest(abstract_state)

    def due(self, step: int) -> bool:
        """Whether the state after so many steps is saved; the same in all processes."""
        return self._config.every > 0 and step % self._config.every == 0

    def retry_due(self) -> str | None:
        """Why the state should be saved at the next step, although none is due: a save was skipped, or failed.

        To be asked before each step, in the primary, whose clock decides; None in other processes.
        """
        return self._retries.due() if self._processes.primary and not self._going() else None

    def check(self) -> None:
        """Raises StorageError when saves were tried for `give_up_seconds`, and none was good. In the primary."""
        if self._processes.primary:
            self._retries.check()

    def counts(self) -> dict[str, float]:
        """For metrics: how many saves there were, and how long they took."""
        return self._retries.counts()

    def save(self, state: Any, step: int, wait: bool = False) -> bool:
        """Starts saving; returns when the arrays are copied, so that they may be donated.

        False, with a report, when nothing was started: the save before is still going, and more than
        `patience_seconds` would be waited for it. What goes wrong from then on (a full disk, a state that is not
        finite) is reported and counted, never raised; the older checkpoints stay. So it is when the last steps before
        were not applied: what made them so may be in the parameters already.

        With `wait` it is the last save of this start. It waits for the one before, and takes the state as it is, whose
        parameters are those of the last step that was applied.
        """
        start = time.monotonic()
        try:
            primary = self._processes.primary
            answer = self._processes.broadcast("save", self._may_start(step, wait=wait) if primary else None)
            if answer != "go":
                return answer == "saved"
            self._attempt += 1
            self._start(state, step, last=wait)
            return True
        finally:
            self._retries.blocked(time.monotonic() - start)

    def wait(self) -> bool:
        """Returns when no save is going on any more; False when one hangs: it is given up like one that fails."""
        if self._going():
            assert self._saving is not None
            self._saving.thread.join(self._retries.left())
        return not self._going()

    def close(self) -> None:
        """Waits for the end of the last save; nothing can be saved afterwards. One that hangs is left behind, and does
        not keep the process from ending."""
        try:
            self.wait()
        finally:
            if self._going():
                assert self._saving is not None
                self._report(f"the save of step {self._saving.step} hangs, and is left behind")
                error = sys.exc_info()[1]
                end_without(self._saving.thread, getattr(error, "exit_code", StorageError.exit_code))

    def restore_newest(
        self, abstract_state: T, *, at_most: int | None = None, newer_than: int | None = None
    ) -> tuple[int, T] | None:
        """The newest checkpoint that is good: (step, state); None when nothing was ever saved. With `at_most`, of those
        up to that step, with `newer_than`, of those of later steps, and None when none of them is good.

        Each candidate is verified, newest first. A bad one is reported and renamed to `<step>.bad`; one that cannot be
        read, and may be sound, is reported and stays.

        Args:
          abstract_state: ShapeDtypeStructs with shardings, which need not be those it was saved with.

        Raises:
          ConfigError: the state has other arrays than `abstract_state`.
          StorageError: there are checkpoints, and none is good; or a good one cannot be loaded.
        """
        steps = self._processes.broadcast("steps", saved_steps(self._directory) if self._processes.primary else None)
        for step in reversed(steps):
            if at_most is not None and step > at_most:
                continue
            if newer_than is not None and step <= newer_than:
                self.last_good = step
                return None
            folder = self._directory / str(step)
            try:
                state = load(folder, step, abstract_state, self._fresh, self._processes)
            except UnreadableCheckpoint as problem:
                self._report(f"checkpoint {folder} is not used: {problem}; it stays where it is")
                continue
            except BadCheckpoint as problem:
                if self._processes.primary:
                    self._report(f"checkpoint {folder} is bad and not used: {problem}; {set_aside(folder)}")
                continue
            self.last_good = step
            return step, state
        # Those of earlier starts too: a run never starts over by itself.
        if (
            at_most is None
            and newer_than is None
            and (bad := [*names_set_aside(self._directory), *map(str, saved_steps(self._directory))])
        ):
            raise StorageError(
                f"no good checkpoint is left in {self._directory}; bad ones: {some(bad)}\n"
                "start over in another run.dir, or put a good copy of a checkpoint there"
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Renames the checkpoints of later steps, newest first: the run goes on from this one in another way."""
        if self._processes.primary:
            for later in reversed(saved_steps(self._directory)):
                if later > step:
                    folder = self._directory / str(later)
                    self._report(f"checkpoint {folder} is not used any more; {set_aside(folder)}")
        self._processes.broadcast("set aside")

    def restore(self, step: int, abstract_state: T) -> T:
        """The state of that step, verified. Raises as `restore_newest`; changes nothing on disk."""
        folder = self._directory / str(step)
        if step not in (steps := saved_steps(self._directory)):
            raise StorageError(f"no checkpoint of step {step} in {self._directory}; there are {steps or 'none'}")
        try:
            state = load(folder, step, abstract_state, self._fresh, self._processes)
        except BadCheckpoint as problem:
            raise StorageError(f"checkpoint {folder} is bad: {problem}") from problem
        self.last_good = step
        return state

    def _going(self) -> bool:
        return self._saving is not None and self._saving.thread.is_alive()

    def _may_start(self, step: int, *, wait: bool) -> Literal["go", "saved", "not now"]:
        if self._going():
            assert self._saving is not None
            if wait:
                self.wait()
            else:
                self._saving.thread.join(self._config.patience_seconds)
        if self._going():
            assert self._saving is not None
            if self._retries.skipped():
                self._report(f"step {step} is not saved: the save of step {self._saving.step} is still going")
            return "not now"
        return "saved" if step == self.last_good else "go"

    def _start(self, state: Any, step: int, *, last: bool) -> None:
        self._retries.started()
        problem: Exception | None = None
        finish_digest, writing = None, None
        try:
            finish_digest = start_digest(state)
            writing = Writing(self._directory / str(step) / STATE, state)
        except Exception as error:  # the others have started, and hear of it in the thread
            problem = error

        def begun() -> tuple[Writing, StateDigest]:
            if problem is not None or finish_digest is None or writing is None:
                raise problem or AssertionError
            return writing, finish_digest()

        def commit(before: _Saving | None = self._saving) -> None:
            if before is not None:
                before.thread.join()  # of the primary's save before, all parts are done
            try:
                self._commit(step, begun, last=last)
            finally:
                if writing is not None:
                    writing.abandon()

        # No thread of a pool, whose end the interpreter would wait for.
        self._saving = _Saving(step, threading.Thread(target=commit, name="checkpoint", daemon=True))
        self._saving.thread.start()

    def _commit(self, step: int, begun: Callable[[], tuple[Writing, StateDigest]], *, last: bool) -> None:
        folder, primary = self._directory / str(step), self._processes.primary
        try:
            writing, digest = together(self._processes, "begun", begun)
            if digest.nonfinite:
                raise StorageError(f"the state is not finite: {some(digest.nonfinite)}")
            streak = int(digest.scalars.get("bad_streak", 0))  # the same in all processes
            if streak and not last:
                self._retries.refused()
                self._report(f"step {step} is not saved: its last {streak} steps were not applied; {self._last()}")
                return
            together(self._processes, "folder", lambda: self._make(folder) if primary else None)
            writing.begin()
            together(self._processes, "written", lambda: self._wait_for(writing))
            names = together(self._processes, "listed", lambda: self._finish(folder, writing) if primary else None)
            mine = self._processes.scatter("files", names)
            sums = together(self._processes, "read back", lambda: {x: FileChecksum.of(folder / x) for x in mine})
            parts = self._processes.gather("checksums", {name: dataclasses.astuple(x) for name, x in sums.items()})
            files = {name: FileChecksum(*x) for part in parts or () for name, x in sorted(part.items())}
            manifest = Manifest.of(step, digest, files) if primary else None
            together(self._processes, "committed", lambda: manifest.write(folder) if manifest else None)
        except LostProcessError:  # as if killed: whether there is a manifest decides
            return
        except Exception as error:
            self._fail(folder, error)
            return
        self.last_good = step
        self._retries.succeeded()
        if primary:
            try:
                self._prune()
            except Exception as error:
                self._report(f"older checkpoints could not be removed: {reason(error)}")

    def _make(self, folder: epath.Path) -> None:
        """An empty folder. What killed saves left goes: to all but a writer, a running save looks the same."""
        if not self._swept:
            for left in half_written(self._directory):
                remove(left)
        self._swept = True
        if (folder / MANIFEST).exists():  # a bad one, which could not be renamed when that was found
            set_aside(folder)
        remove(folder)
        (folder / STATE).mkdir(parents=True)

    def _wait_for(self, writing: Writing) -> None:
        """Returns when this process has written its part; raises as soon as another one could not."""
        failed = f"save {self._attempt} failed"
        while self._processes.count > 1:
            try:
                return writing.wait(1.0)
            except TimeoutError:
                if problem := self._processes.told(failed):
                    raise StorageError(problem) from None
            except Exception as error:
                self._processes.tell(failed, f"{self._processes.name(self._processes.index)}: {reason(error)}")
                raise
        writing.wait()

    def _finish(self, folder: epath.Path, writing: Writing) -> list[list[str]]:
        """What one process writes, and which of all files each of them reads back."""
        writing.finish()
        for name, contents in self._attachments.items():
            write_atomically(folder / name, contents)
        return shares(file_sizes(folder), self._processes.count)

    def _fail(self, folder: epath.Path, error: Exception) -> None:
        self._swept = False  # what is still being written of this one comes after its removal
        seconds = self._retries.failed(reason(error))
        if not self._processes.primary:
            return
        with contextlib.suppress(Exception):  # the next writer tries again
            if not (folder / MANIFEST).exists():
                remove(folder)  # before the report, which may need the space
        self._report(
            f"checkpoint {folder} was not saved: {reason(error)}; the run goes on, {self._last()}; "
            f"tried again in {seconds:.0f} s"
        )

    def _last(self) -> str:
        return "there is no older one" if self.last_good is None else f"the last good one is {self.last_good}"

    def _prune(self) -> None:
        good = [info.step for info in list_checkpoints(self._directory) if info.problem is None]
        config = self._config
        for step in to_prune(good, keep_last=config.keep_last, keep_every=config.keep_every, keep=self.last_good):
            remove(self._directory / str(step))


@dataclass(frozen=True)
class _Saving:
    step: int
    thread: threading.Thread
