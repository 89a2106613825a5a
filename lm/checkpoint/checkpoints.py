"""Checkpoints: the whole state of a run at a step, saved beside training and trusted only after a check.

<directory>/<step>/state/           the arrays, as Orbax writes them
                   config.json, …   attachments: small files that make the checkpoint usable alone
                   manifest.json    the digest of the state and the checksum of every file, written last

The manifest is the commit marker, on a local disk as in a bucket: a folder without one is what a killed save,
or a killed removal, left behind.

In a run of many processes each one writes the arrays that its devices hold, reads back its share of all files, and
hears from the primary what is saved, or restored; a step that failed in one of them has failed in all. That all reach
the same directory is for the user to see to.
"""

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import Any, Literal, TypeVar, cast

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.digest import LeafDigest, StateDigest, leaf_paths, start_digest, state_digest
from lm.checkpoint.manifest import NAME as MANIFEST
from lm.checkpoint.manifest import BadCheckpoint, FileChecksum, Manifest, file_sizes, reason, shares, verify
from lm.checkpoint.restack import restack, restacked, stacked_as
from lm.errors import ConfigError, LostProcessError, StorageError
from lm.files import write_atomically
from lm.parallel.processes import ALONE, Processes

T = TypeVar("T")
R = TypeVar("R")

PATIENCE_SECONDS = 10.0
"""How long a save holds training up for the one before it; storage that is slower than that loses a save."""

# Orbax logs a page for each failure that it also raises; what is raised is reported here in a line.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)


def _silence_late_writes(before: Callable[[Any], Any] = sys.unraisablehook) -> None:
    """When one file of a save cannot be written, Orbax stops waiting for the others. Each of these then finds its event
    loop closed and says so from a thread of its own, in the middle of whatever is printed."""

    def hook(problem: Any) -> None:
        first = problem.exc_traceback and problem.exc_traceback.tb_frame.f_code.co_name
        if not (str(problem.exc_value) == "Event loop is closed" and first == "call_soon_threadsafe"):
            before(problem)

    sys.unraisablehook = hook


_silence_late_writes()


@dataclass(frozen=True)
class CheckpointInfo:
    step: int
    digest: str  # equal exactly when the states are bit for bit the same
    bytes: int
    time: float  # seconds since 1970 at which it was committed
    problem: str | None  # why it cannot be used, as far as the manifest alone shows


class Checkpoints:
    """Saves and restores the state of one run. Constructing it changes nothing on disk.

    `attachments` are stored with every checkpoint, by file name. `report` is given one message for each
    thing that the user should know; it is called from the thread that saves as well, in the primary process only.
    With several `processes`, all of them call the same methods in the same order.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        config: CheckpointConfig,
        attachments: Mapping[str, bytes],
        report: Callable[[str], None],
        processes: Processes = ALONE,
    ):
        for name in attachments:
            if name in (_STATE, MANIFEST) or "/" in name:
                raise ValueError(f"{name!r} cannot be the file name of an attachment")
        self.last_good: int | None = None  # step that was committed or restored last
        self.failures = 0  # saves that were started and came to nothing
        self._directory = epath.Path(directory)
        self._config = config
        self._attachments = dict(attachments)
        self._report = report if processes.primary else lambda _: None
        self._processes = processes
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._attempt = 0
        self._swept = False

    def attach(self, name: str, contents: bytes) -> None:
        """Another attachment, of the checkpoints from now on."""
        self._attachments = {**self._attachments, name: contents}

    def save(self, state: Any, step: int, wait: bool = False) -> bool:
        """Starts saving; returns when the arrays are copied, so that they may be donated.

        False, with a report, when nothing was started: the save before is still going after PATIENCE_SECONDS
        (with `wait`, it is waited for to its end), or the copy could not be made. What goes wrong from then on (a
        full disk, a state that is not finite) is reported and counted in `failures`, never raised; the older
        checkpoints stay.
        """
        primary = self._processes.primary
        prepared = self._processes.broadcast("save", self._prepare(step, wait=wait) if primary else None)
        if prepared != "ready":
            return prepared == "saved"
        self.wait()  # of the primary's save before, all parts are done
        folder = self._directory / str(step)
        try:
            finish_digest = start_digest(state)
            written = _start_writing(folder / _STATE, state)
        except Exception as error:  # storage libraries raise classes of their own
            if self._processes.count > 1:  # the others have started: without this one they would wait for ever
                raise StorageError(f"checkpoint {folder} cannot be started: {reason(error)}") from error
            self._fail(folder, error)
            return False
        self._attempt += 1
        self._pending = step, self._thread.submit(self._commit, folder, step, finish_digest, written)
        return True

    def wait(self) -> None:
        """Returns when no save is going on any more."""
        if self._pending:
            self._pending[1].result()

    def close(self) -> None:
        """Waits for the end of the last save; nothing can be saved afterwards."""
        self._thread.shutdown()

    def restore_newest(self, abstract_state: T) -> tuple[int, T] | None:
        """The newest checkpoint that is good: (step, state); None when nothing was ever saved.

        Each candidate is verified, newest first. A bad one is reported and renamed to `<step>.bad`.

        Args:
          abstract_state: ShapeDtypeStructs with shardings, which need not be those it was saved with.

        Raises:
          ConfigError: the state has other arrays than `abstract_state`.
          StorageError: there are checkpoints, and none is good; or a good one cannot be loaded.
        """
        steps = self._processes.broadcast("steps", _steps(self._directory) if self._processes.primary else None)
        for step in reversed(steps):
            folder = self._directory / str(step)
            try:
                state = self._load(folder, step, abstract_state)
            except BadCheckpoint as problem:
                if self._processes.primary:
                    self._report(f"checkpoint {folder} is bad and not used: {problem}; {_set_aside(folder)}")
                continue
            self.last_good = step
            return step, state
        if bad := _bad(self._directory):  # those of earlier starts too: a run never starts over by itself
            raise StorageError(
                f"no good checkpoint is left in {self._directory}; bad ones: {_some(bad)}\n"
                "start over in another run.dir, or put a good copy of a checkpoint there"
            )
        return None

    def restore(self, step: int, abstract_state: T) -> T:
        """The state of that step, verified. Raises as `restore_newest`; changes nothing on disk."""
        folder = self._directory / str(step)
        if step not in (steps := _steps(self._directory)):
            raise StorageError(f"no checkpoint of step {step} in {self._directory}; there are {steps or 'none'}")
        try:
            state = self._load(folder, step, abstract_state)
        except BadCheckpoint as problem:
            raise StorageError(f"checkpoint {folder} is bad: {problem}") from problem
        self.last_good = step
        return state

    def _prepare(self, step: int, *, wait: bool) -> Literal["ready", "saved", "not saved"]:
        if self._pending:
            futures.wait([self._pending[1]], timeout=None if wait else PATIENCE_SECONDS)
        if self._pending and not self._pending[1].done():
            self._report(f"step {step} is not saved: the save of step {self._pending[0]} is still going")
            return "not saved"
        if step == self.last_good:
            return "saved"
        folder = self._directory / str(step)
        try:
            self._sweep()
            _remove(folder)
            folder.mkdir(parents=True)
        except Exception as error:
            self._fail(folder, error)
            return "not saved"
        return "ready"

    def _commit(
        self,
        folder: epath.Path,
        step: int,
        finish_digest: Callable[[], StateDigest],
        written: ocp.AsyncResponse[None],
    ) -> None:
        try:
            self._together("written", lambda: self._wait_for(written))
            digest = self._together("digest", lambda: _finite(finish_digest()))
            primary = self._processes.primary
            names = self._together("listed", lambda: self._attach_and_list(folder) if primary else None)
            mine = self._processes.scatter("files", names)
            sums = self._together("read back", lambda: {name: FileChecksum.of(folder / name) for name in mine})
            parts = self._processes.gather("checksums", {name: dataclasses.astuple(x) for name, x in sums.items()})
            files = {name: FileChecksum(*x) for part in parts or () for name, x in sorted(part.items())}
            self._together("committed", lambda: Manifest.of(step, digest, files).write(folder) if parts else None)
        except LostProcessError:  # as if killed: whether there is a manifest decides
            return
        except Exception as error:
            self._fail(folder, error)
            return
        self.last_good = step
        if not primary:
            return
        try:
            self._prune()
        except Exception as error:
            self._report(f"older checkpoints could not be removed: {reason(error)}")

    def _wait_for(self, written: ocp.AsyncResponse[None]) -> None:
        """Returns when all have written. Orbax waits for the others long after one of them has failed."""
        failed = f"save {self._attempt} failed"
        while self._processes.count > 1:
            try:
                return written.result(timeout=1.0)
            except TimeoutError:
                if problem := self._processes.told(failed):
                    raise StorageError(problem) from None
            except Exception as error:
                self._processes.tell(failed, f"{self._processes.name(self._processes.index)}: {reason(error)}")
                raise
        written.result()

    def _attach_and_list(self, folder: epath.Path) -> list[list[str]]:
        for name, contents in self._attachments.items():
            write_atomically(folder / name, contents)
        return shares(file_sizes(folder), self._processes.count)

    def _load(self, folder: epath.Path, step: int, abstract_state: T) -> T:
        primary = self._processes.primary
        manifest = self._together("manifest", lambda: _fitting(folder, step, abstract_state) if primary else None)
        parts = shapes = None
        if manifest is not None:
            shapes = {path: leaf.shape for path, leaf in manifest.leaves.items()}
            split = shares({name: file.size for name, file in manifest.files.items()}, self._processes.count)
            files = {name: dataclasses.astuple(file) for name, file in manifest.files.items()}
            parts = [(manifest.digest, {name: files[name] for name in names}) for names in split]
        expected, mine = self._processes.scatter("restored files", parts)
        self._together("verified", lambda: verify(folder, {name: FileChecksum(*x) for name, x in mine.items()}))
        shapes = self._processes.broadcast("restored shapes", shapes)
        try:
            state = ocp.load(_absolute(folder / _STATE), stacked_as(abstract_state, shapes))
        except Exception as error:  # with sound files the fault is elsewhere, and older ones would meet it too
            raise StorageError(f"checkpoint {folder} is sound but cannot be loaded: {reason(error)}") from error
        loaded = state_digest(state)
        if loaded.digest != expected:  # the same in all processes
            saved = manifest.leaves if manifest is not None else loaded.leaves
            changed = [path for path, leaf in loaded.leaves.items() if leaf != saved[path]]
            raise BadCheckpoint(f"the arrays are not those that were saved: {_some(changed)}")
        return restack(state, abstract_state)

    def _together(self, name: str, work: Callable[[], R]) -> R:
        """Does this process's part. When a part of any process failed, that is raised in all of them."""
        if self._processes.count == 1:
            return work()
        result, problem = None, None
        try:
            result = work()
        except Exception as error:
            problem = type(error).__name__, reason(error)
        problems = self._processes.gather(name, problem)
        first = None
        for index, found in enumerate(problems or ()):
            if found and first is None:
                kind, text = found
                first = kind, text if index == 0 else f"{self._processes.name(index)}: {text}"
        first = self._processes.broadcast(name, first)
        if first:
            kinds = {kind.__name__: kind for kind in (BadCheckpoint, ConfigError)}
            raise kinds.get(first[0], StorageError)(first[1])
        return cast(R, result)

    def _fail(self, folder: epath.Path, error: Exception) -> None:
        self.failures += 1
        if not self._processes.primary:
            return
        with contextlib.suppress(Exception):  # the next writer tries again
            _remove(folder)  # before the report, which may need the space
        last = "there is no older one" if self.last_good is None else f"the last good one is {self.last_good}"
        self._report(f"checkpoint {folder} was not saved: {reason(error)}; the run goes on, {last}")

    def _sweep(self) -> None:
        """Removes what killed saves left. Only a writer may: to others, a running save looks the same."""
        if not self._swept:
            for folder in _numbered(self._directory):
                if not (folder / MANIFEST).exists():
                    _remove(folder)
        self._swept = True

    def _prune(self) -> None:
        steps = [info.step for info in list_checkpoints(self._directory) if info.problem is None]
        for step in steps[: -self._config.keep_last]:
            for_good = self._config.keep_every and step % self._config.keep_every == 0
            if step != self.last_good and not for_good:
                _remove(self._directory / str(step))


def list_checkpoints(directory: str | PathLike[str]) -> list[CheckpointInfo]:
    """What is saved there, oldest first. Reads the manifests only."""
    infos = []
    for step in _steps(epath.Path(directory)):
        try:
            manifest = Manifest.read(epath.Path(directory) / str(step), step)
            infos.append(CheckpointInfo(step, manifest.digest, manifest.bytes, manifest.time, None))
        except (BadCheckpoint, StorageError) as problem:
            infos.append(CheckpointInfo(step, "", 0, 0.0, str(problem)))
    return infos


def read_attachment(directory: str | PathLike[str], step: int, name: str) -> bytes:
    """A file that was saved with the state. Raises StorageError when it is not there as it was written."""
    folder = epath.Path(directory) / str(step)
    try:
        manifest = Manifest.read(folder, step)
        if name not in manifest.files:
            attached = [file for file in manifest.files if "/" not in file]
            raise StorageError(f"checkpoint {folder} has no {name}; it has {_some(attached) or 'no attachments'}")
        manifest.verify(folder, name)
        return (folder / name).read_bytes()
    except (BadCheckpoint, OSError) as problem:
        raise StorageError(f"cannot read {folder / name}: {problem}") from problem


_STATE = "state"


def _start_writing(path: epath.Path, state: Any) -> ocp.AsyncResponse[None]:
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly compress, and it takes five times as long
    with context:
        return ocp.save_async(_absolute(path), state)


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax takes no other local paths."""
    return path if "://" in str(path) else path.absolute()


def _fitting(folder: epath.Path, step: int, abstract_state: Any) -> Manifest:
    manifest = Manifest.read(folder, step)
    _check_same_arrays(folder, manifest.leaves, abstract_state)
    return manifest


def _finite(digest: StateDigest) -> StateDigest:
    if digest.nonfinite:
        raise StorageError(f"the state is not finite: {_some(digest.nonfinite)}")
    return digest


def _check_same_arrays(folder: epath.Path, saved: Mapping[str, LeafDigest], abstract_state: Any) -> None:
    def kind(shape: tuple[int, ...], dtype: str) -> str:
        return f"{dtype}[{', '.join(map(str, shape))}]"

    there = {path: kind(leaf.shape, leaf.dtype) for path, leaf in saved.items()}
    leaves = zip(leaf_paths(abstract_state), jax.tree.leaves(abstract_state), strict=True)
    here = {}
    for path, x in leaves:
        stacked_otherwise = path in saved and "layers/" in path and restacked(saved[path].shape, x.shape)
        here[path] = kind(saved[path].shape if stacked_otherwise else x.shape, x.dtype.name)
    differences = [
        f"{path} is {there.get(path, 'missing')} there, {here.get(path, 'missing')} here"
        for path in [*here, *sorted(there.keys() - here.keys())]
        if there.get(path) != here.get(path)
    ]
    if differences:
        raise ConfigError(f"checkpoint {folder} does not fit this config: {_some(differences, '; ')}")


def _numbered(directory: epath.Path) -> list[epath.Path]:
    if not directory.exists():
        return []
    folders = [path for path in directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name)]
    return sorted(folders, key=lambda path: int(path.name))


def _steps(directory: epath.Path) -> list[int]:
    """Steps that were committed, in order."""
    return [int(folder.name) for folder in _numbered(directory) if (folder / MANIFEST).exists()]


def _remove(folder: epath.Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)  # first: what a kill leaves then is no checkpoint
    folder.rmtree(missing_ok=True)


def _set_aside(folder: epath.Path) -> str:
    """Renames a bad checkpoint, and says how."""
    names = (f"{folder.name}.bad{n}" for n in ("", *range(2, 1000)))
    target = next(path for path in (folder.with_name(name) for name in names) if not path.exists())
    try:
        folder.rename(target)
    except OSError as error:
        return f"it could not be renamed: {reason(error)}"
    return f"it is kept as {target.name}"


def _bad(directory: epath.Path) -> list[str]:
    """Names of the checkpoints that are set aside, or that could not be."""
    if not directory.exists():
        return []
    aside = [path.name for path in directory.iterdir() if re.fullmatch(r"\d+\.bad\d*", path.name)]
    return sorted(aside) + [str(step) for step in _steps(directory)]


def _some(items: Iterable[str], separator: str = ", ") -> str:
    first = list(items)
    more = [f"and {len(first) - 3} more"] if len(first) > 3 else []
    return separator.join(first[:3] + more)
