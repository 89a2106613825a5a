"""Checkpoints: the whole state of a run at a step, saved beside training and trusted only after a check.

<directory>/<step>/state/           the arrays, as Orbax writes them
                   config.json, …   attachments: small files that make the checkpoint usable alone
                   manifest.json    the digest of the state and the checksum of every file, written last

The manifest is the commit marker, on a local disk as in a bucket: a folder without one is what a killed save,
or a killed removal, left behind.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from os import PathLike
from typing import Any, TypeVar

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from lm.errors import ConfigError, StorageError
from lm.train.config import CheckpointConfig
from lm.train.digest import LeafDigest, StateDigest, leaf_paths, start_digest, state_digest
from lm.train.manifest import NAME as MANIFEST
from lm.train.manifest import BadCheckpoint, Manifest, reason
from lm.train.run_directory import write_atomically

T = TypeVar("T")

PATIENCE_SECONDS = 10.0
"""How long a save holds training up for the one before it; storage that is slower than that loses a save."""

# Orbax logs a page for each failure that it also raises; what is raised is reported here in a line.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)


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
    thing that the user should know; it is called from the thread that saves as well.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        config: CheckpointConfig,
        attachments: Mapping[str, bytes],
        report: Callable[[str], None],
    ):
        for name in attachments:
            if name in (_STATE, MANIFEST) or "/" in name:
                raise ValueError(f"{name!r} cannot be the file name of an attachment")
        self.last_good: int | None = None  # step that was committed or restored last
        self.failures = 0  # saves that were started and came to nothing
        self._directory = epath.Path(directory)
        self._config = config
        self._attachments = dict(attachments)
        self._report = report
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._swept = False

    def save(self, state: Any, step: int, wait: bool = False) -> bool:
        """Starts saving; returns when the arrays are copied, so that they may be donated.

        False, with a report, when nothing was started: the save before is still going after PATIENCE_SECONDS
        (with `wait`, it is waited for to its end), or the copy could not be made. What goes wrong from then on (a
        full disk, a state that is not finite) is reported and counted in `failures`, never raised; the older
        checkpoints stay.
        """
        if self._pending:
            futures.wait([self._pending[1]], timeout=None if wait else PATIENCE_SECONDS)
        if self._pending and not self._pending[1].done():
            self._report(f"step {step} is not saved: the save of step {self._pending[0]} is still going")
            return False
        if step == self.last_good:
            return True
        folder = self._directory / str(step)
        try:
            self._sweep()
            _remove(folder)
            folder.mkdir(parents=True)
            finish_digest = start_digest(state)
            written = _start_writing(folder / _STATE, state)
        except Exception as error:  # storage libraries raise classes of their own
            self._fail(folder, error)
            return False
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
        for step in reversed(_steps(self._directory)):
            folder = self._directory / str(step)
            try:
                state = _load(folder, step, abstract_state)
            except BadCheckpoint as problem:
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
            state = _load(folder, step, abstract_state)
        except BadCheckpoint as problem:
            raise StorageError(f"checkpoint {folder} is bad: {problem}") from problem
        self.last_good = step
        return state

    def _commit(
        self,
        folder: epath.Path,
        step: int,
        finish_digest: Callable[[], StateDigest],
        written: ocp.AsyncResponse[None],
    ) -> None:
        try:
            written.result()
            digest = finish_digest()
            if digest.nonfinite:
                raise StorageError(f"the state is not finite: {_some(digest.nonfinite)}")
            for name, contents in self._attachments.items():
                write_atomically(folder / name, contents)
            Manifest.of(folder, step, digest).write(folder)
        except Exception as error:
            self._fail(folder, error)
            return
        self.last_good = step
        try:
            self._prune()
        except Exception as error:
            self._report(f"older checkpoints could not be removed: {reason(error)}")

    def _fail(self, folder: epath.Path, error: Exception) -> None:
        self.failures += 1
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


def _load(folder: epath.Path, step: int, abstract_state: T) -> T:
    manifest = Manifest.read(folder, step)
    _check_same_arrays(folder, manifest.leaves, abstract_state)
    manifest.verify(folder)
    try:
        state = ocp.load(_absolute(folder / _STATE), abstract_state)
    except Exception as error:  # with sound files the fault is elsewhere, and older ones would meet it too
        raise StorageError(f"checkpoint {folder} is sound but cannot be loaded: {reason(error)}") from error
    loaded = state_digest(state)
    if loaded.digest != manifest.digest:
        changed = [path for path, leaf in loaded.leaves.items() if leaf != manifest.leaves[path]]
        raise BadCheckpoint(f"the arrays are not those that were saved: {_some(changed)}")
    return state


def _check_same_arrays(folder: epath.Path, saved: Mapping[str, LeafDigest], abstract_state: Any) -> None:
    def kind(shape: tuple[int, ...], dtype: str) -> str:
        return f"{dtype}[{', '.join(map(str, shape))}]"

    there = {path: kind(leaf.shape, leaf.dtype) for path, leaf in saved.items()}
    leaves = zip(leaf_paths(abstract_state), jax.tree.leaves(abstract_state), strict=True)
    here = {path: kind(x.shape, x.dtype.name) for path, x in leaves}
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
