"""Checkpoints on each host, made more often than the durable ones: for a restart on the same hosts.

<local_dir>/<digest of the run's path>/process-<i>/<step>/
    shards.bin      what the devices of the process hold
    shards.json     of which run, and what is where in shards.bin
    config.json, …  attachments; of the primary
    manifest.json   as that of a durable checkpoint, written last

One counts when all processes have it, each the part that its devices are to hold. Nothing here ends a run: what fails
is reported, counted, and tried again when the next is due.
"""

import contextlib
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Generic, TypeVar

from etils import epath

from lm.checkpoint.checkpoints import Checkpoints
from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.digest import start_digest, state_digest
from lm.checkpoint.folder import half_written, remove, saved_steps
from lm.checkpoint.listing import read_attachment
from lm.checkpoint.manifest import BadCheckpoint, FileChecksum, Manifest, StateDigest, file_sizes
from lm.checkpoint.retries import Retries
from lm.checkpoint.shards import (
    Index,
    copy_shards,
    index_from_json,
    index_to_json,
    read_shards,
    refuse_other_layout,
    write_shards,
)
from lm.checkpoint.together import together
from lm.errors import LostProcessError, StorageError
from lm.files import is_url, reason
from lm.parallel.processes import ALONE, Processes

T = TypeVar("T")

INDEX = "shards.json"
WAIT_SECONDS = 60.0
"""How long is waited for a save whose result is to be removed."""


def local_directory(config: CheckpointConfig, run_dir: str | PathLike[str], index: int = 0) -> epath.Path:
    """Where the checkpoints of one of the processes are, a folder for each step as in that of the durable ones."""
    path = str(run_dir) if is_url(epath.Path(run_dir)) else os.path.abspath(run_dir)
    name = hashlib.sha256(path.encode()).hexdigest()[:16]
    return epath.Path(config.local_dir) / name / f"process-{index}"


def steps_of_run(directory: epath.Path, run: str) -> list[int]:
    """Which steps of this run one process has, as far as small files tell."""
    found = []
    for step in _saved_steps(directory):
        with contextlib.suppress(StorageError, ValueError, KeyError, TypeError):
            if json.loads(read_attachment(directory, step, INDEX))["run"] == run:
                found.append(step)
    return found


@dataclass(frozen=True)
class Restored(Generic[T]):
    step: int
    state: T
    tier: str
    """ "local" or "durable"."""
    directory: epath.Path
    """Of checkpoints, for `read_attachment` in the primary."""


def restore_newest(
    durable: Checkpoints, local: "LocalCheckpoints", directory: epath.Path, abstract_state: T
) -> Restored[T] | None:
    """The newest good checkpoint of either tier, durable ones first. `directory` is that of the durable ones.

    Raises as `Checkpoints.restore_newest`.
    """
    steps, problems = local.whole_steps(abstract_state)
    found: Restored[T] | None = None
    for step in reversed(steps):
        if newer := durable.restore_newest(abstract_state, newer_than=step - 1):
            found = Restored(*newer, "durable", directory)
            break
        state = local.restore(step, abstract_state)
        if state is not None:
            found = Restored(step, state, "local", local.directory)
            break
    if found is None and (last := durable.restore_newest(abstract_state)):
        found = Restored(*last, "durable", directory)
    local.tell_of(problems, newer_than=-1 if found is None else found.step)
    return found


class LocalCheckpoints:
    """Those of one run, as one process sees them. With `config.local_dir` empty there are none, and everything is free.

    `run` identifies the run, in the primary: another one may have been in the same place. All processes call the same
    methods in the same order, but for `due` and `counts`.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run_dir: str | PathLike[str],
        run: str,
        report: Callable[[str], None],
        processes: Processes = ALONE,
    ):
        self.directory = local_directory(config, run_dir, processes.index)
        self._on = bool(config.local_dir)
        self._run = processes.broadcast("run", run) if self._on else ""
        self._seconds, self._keep = config.local_seconds, config.local_keep
        self._report = report if processes.primary else lambda _: None
        self._processes = processes
        self._retries = Retries(give_up_seconds=0)
        self._whole: list[int] = []  # the steps that all processes have; the same list in all
        self._last = time.monotonic()  # when one was started, or left out
        self._failing = False
        self._thread: threading.Thread | None = None

    def due(self) -> str | None:
        """Why a save is due now. To be asked before each step, in the primary, whose clock decides; None elsewhere."""
        now = time.monotonic()
        if not self._on or not self._processes.primary or now - self._last < self._seconds:
            return None
        if self._going():
            self._last = now
            if self._retries.skipped():
                self._report("a local checkpoint is left out: the one before is still being written")
            return None
        return "checkpoint.local_seconds"

    def save(self, state: Any, step: int, attachments: Mapping[str, bytes]) -> None:
        """Starts saving; returns when the arrays are copied, so that they may be donated.

        A state that is not finite, or whose last steps were not applied, is not kept.
        """
        self._last = time.monotonic()
        self._retries.started()
        problem: Exception | None = None
        digest, shards = None, None
        try:
            digest, shards = start_digest(state), copy_shards(state)
        except Exception as error:  # the others have started, and hear of it in the thread
            problem = error
        copied = _Copied(step, digest, shards, attachments if self._processes.primary else {}, problem)

        def commit(before: threading.Thread | None = self._thread) -> None:
            if before is not None:
                before.join()  # of the primary's save before, all parts are done
            self._commit(copied)

        self._thread = threading.Thread(target=commit, name="local checkpoint", daemon=True)
        self._thread.start()
        self._retries.blocked(time.monotonic() - self._last)

    def counts(self) -> dict[str, float]:
        """For metrics: as those of `Checkpoints`, by names that begin with "local_"."""
        return {f"local_{name}": value for name, value in self._retries.counts().items()} if self._on else {}

    def whole_steps(self, abstract_state: Any) -> tuple[list[int], dict[int, str]]:
        """The steps that each process has, with what its devices are to hold of an `abstract_state`, in order; and why
        others are not among them. Only small files are read."""
        if not self._on:
            return [], {}
        mine = []
        for step in _saved_steps(self.directory):
            try:
                manifest, _ = self._read(step, abstract_state)
                mine.append((step, manifest.digest, ""))
            except (BadCheckpoint, StorageError) as problem:
                mine.append((step, "", str(problem)))
        found = self._processes.gather("local steps", mine)
        answer = None if found is None else self._agreed(found)
        self._whole, problems = self._processes.broadcast("local steps", answer)
        return list(self._whole), dict(problems)

    def restore(self, step: int, abstract_state: T) -> T | None:
        """The state of that step, one of `whole_steps`, verified; None, with a report, when it is not as saved."""

        def part() -> tuple[str, T]:
            manifest, index = self._read(step, abstract_state)
            folder = self.directory / str(step)
            manifest.verify(folder)
            try:
                return manifest.digest, read_shards(folder, index, abstract_state)
            except (OSError, ValueError) as error:
                raise BadCheckpoint(str(error)) from error

        try:
            digest, state = together(self._processes, "local restored", part)
            if state_digest(state).digest != digest:
                raise BadCheckpoint("the arrays are not those that were saved")
            return state
        except BadCheckpoint as problem:
            self._whole.remove(step)
            self.tell_of({step: str(problem)}, newer_than=-1)
            return None

    def tell_of(self, problems: Mapping[int, str], *, newer_than: int) -> None:
        """Reports why those of later steps are not used."""
        for step, problem in problems.items():
            if step > newer_than:
                self._report(f"local checkpoint {step} is not used: {problem}")

    def remove_after(self, step: int) -> None:
        """Removes those of later steps: the run goes on from this one in another way."""
        self.wait()
        self._whole = [whole for whole in self._whole if whole <= step]
        self._remove([saved for saved in _saved_steps(self.directory) if saved > step] if self._on else [])

    def remove_all(self) -> None:
        """Gives the space back: a durable checkpoint of the last step is there."""
        if not self._on:
            return
        self.wait()
        self._whole = []
        self._remove(_saved_steps(self.directory))
        with contextlib.suppress(Exception):
            self.directory.rmtree(missing_ok=True)
        with contextlib.suppress(OSError):
            os.rmdir(self.directory.parent)  # the last process of the host does

    def wait(self) -> None:
        """Returns when no save is going on any more, or one has taken too long to wait for."""
        if self._thread is not None:
            self._thread.join(WAIT_SECONDS)

    def _going(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _remove(self, steps: Sequence[int]) -> None:
        with contextlib.suppress(Exception):  # epath raises others beside OSError
            for step in reversed(steps):
                remove(self.directory / str(step))

    def _read(self, step: int, abstract_state: Any) -> tuple[Manifest, Index]:
        """Raises BadCheckpoint, or StorageError, for what this process cannot use."""
        folder = self.directory / str(step)
        manifest = Manifest.read(folder, step)
        try:
            manifest.verify(folder, INDEX)
            about = json.loads((folder / INDEX).read_bytes())
            run, index = about["run"], index_from_json(about["shards"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise BadCheckpoint(f"{INDEX} cannot be read: {error!r}") from error
        if run != self._run:
            raise BadCheckpoint("it is of another run that was in the same run.dir")
        refuse_other_layout(index, manifest.leaves, abstract_state)
        return manifest, index

    def _agreed(self, found: Sequence[Sequence[tuple[int, str, str]]]) -> tuple[list[int], list[tuple[int, str]]]:
        """Of what each process has: the steps that all have alike, and why not the others."""
        whole, problems = [], []
        parts = [{step: (digest, problem) for step, digest, problem in part} for part in found]
        for step in sorted(set().union(*parts)):
            first = ""
            for index, part in enumerate(parts):
                digest, problem = part.get(step, ("", "it is not there"))
                if not problem and digest != parts[0].get(step, (digest,))[0]:
                    problem = "it is a part of another state"
                if problem:
                    first = problem if len(parts) == 1 else f"{self._processes.name(index)}: {problem}"
                    break
            if first:
                problems.append((step, first))
            else:
                whole.append(step)
        return whole, problems

    def _commit(self, copied: "_Copied") -> None:
        folder = self.directory / str(copied.step)
        try:
            manifest = together(self._processes, "local written", lambda: self._write(folder, copied))
            if manifest is None:
                self._retries.refused()
                return
            together(self._processes, "local committed", lambda: manifest.write(folder))
        except LostProcessError:  # as if killed
            return
        except Exception as error:
            with contextlib.suppress(Exception):
                remove(folder)
            self._retries.failed(reason(error))
            if not self._failing:
                self._report(
                    f"local checkpoint {folder} was not saved: {reason(error)}; the run goes on, and this is not said "
                    "again until one is"
                )
            self._failing = True
            return
        self._failing = False
        self._whole = [*self._whole, copied.step]
        self._retries.succeeded()

    def _write(self, folder: epath.Path, copied: "_Copied") -> Manifest | None:
        """What this process writes, and reads back; None for a state that is not to be kept, the same everywhere."""
        if copied.problem is not None or copied.digest is None or copied.shards is None:
            raise copied.problem or AssertionError
        digest = copied.digest()
        if digest.nonfinite or digest.scalars.get("bad_streak"):
            return None
        _make_own(self.directory)
        kept = self._whole[1 - self._keep :]
        for left in [*half_written(self.directory), *(self.directory / str(s) for s in saved_steps(self.directory))]:
            if int(left.name) not in kept or left == folder:
                remove(left)
        folder.mkdir()
        index = write_shards(folder, copied.shards)
        about = {"run": self._run, "shards": index_to_json(index)}
        for name, contents in {**copied.attachments, INDEX: json.dumps(about).encode()}.items():
            (folder / name).write_bytes(contents)
        return Manifest.of(copied.step, digest, {name: FileChecksum.of(folder / name) for name in file_sizes(folder)})


def _saved_steps(directory: epath.Path) -> list[int]:
    """None where nothing can be read: saving will say what is wrong there."""
    try:
        return saved_steps(directory)
    except OSError:
        return []


@dataclass(frozen=True)
class _Copied:
    """A state on its way, or why it is not."""

    step: int
    digest: Callable[[], StateDigest] | None
    shards: Mapping[str, Any] | None
    attachments: Mapping[str, bytes]
    problem: Exception | None


def _make_own(directory: epath.Path) -> None:
    """The folder of the run may be in one that all users share: nobody else is to read or to have made it.

    Raises StorageError, or OSError.
    """
    run = directory.parent
    run.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(run, 0o700)
    found = os.lstat(run)
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.geteuid():
        raise StorageError(f"{run} is a link, or belongs to another user: choose another checkpoint.local_dir")
    directory.mkdir(exist_ok=True)
