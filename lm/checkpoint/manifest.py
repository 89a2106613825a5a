"""The manifest of a checkpoint: what was saved, and how to tell that it is still that.

It holds two independent witnesses. The digest was computed on the devices from the arrays themselves; the
checksums were computed from the files, read back after they were written. Both are needed: Orbax loads a
flipped byte without a word, and sound files may hold something else than what was in memory.
"""

import dataclasses
import functools
import hashlib
import heapq
import importlib.metadata
import json
import os
import pathlib
import platform
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from etils import epath

from lm.errors import StorageError
from lm.files import is_url, reason, write_atomically

R = TypeVar("R")

NAME = "manifest.json"
FORMAT = 2
"""Of a checkpoint's folder; to be raised when the code before could not go on with what is then written.

1: the state without `guard`; arrays in state/state/
2: `guard` in the state, `scalars` in the manifest; arrays in state/
"""

ADDED = {2: ("guard/",)}
"""What the paths of leaves start with that came into the state with a format: older checkpoints lack them."""


READ_WAITS = (1.0, 4.0)
"""Seconds after which what could not be read is tried again."""


class BadCheckpoint(Exception):
    """The files of a checkpoint are not what was saved."""


class UnreadableCheckpoint(BadCheckpoint):
    """Storage does not give what may be sound."""


@dataclass(frozen=True)
class FileChecksum:
    size: int
    sha256: str

    @classmethod
    def of(cls, path: epath.Path) -> Self:
        checksum, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(2**22):
                checksum.update(chunk)
                size += len(chunk)
        return cls(size, checksum.hexdigest())


@dataclass(frozen=True)
class LeafDigest:
    shape: tuple[int, ...]
    dtype: str
    lanes: str  # the four sums, 32 hexadecimal digits


@dataclass(frozen=True)
class StateDigest:
    digest: str  # sha256 over paths, shapes, dtypes and lanes, in hexadecimal
    leaves: Mapping[str, LeafDigest]
    scalars: Mapping[str, float]  # values of the arrays without dimensions, by path
    nonfinite: tuple[str, ...]  # paths of the arrays that hold a NaN or an infinity


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says. The file ends with a checksum of the rest of it."""

    format: int
    step: int
    digest: str
    time: float
    bytes: int
    versions: dict[str, str]
    leaves: dict[str, LeafDigest]
    files: dict[str, FileChecksum]
    scalars: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, step: int, digest: StateDigest, files: Mapping[str, FileChecksum]) -> Self:
        """The manifest of a state and of the files of its folder, read back from there."""
        packages = ("jax", "jaxlib", "orbax-checkpoint")
        return cls(
            format=FORMAT,
            step=step,
            digest=digest.digest,
            time=time.time(),
            bytes=sum(file.size for file in files.values()),
            versions={name: importlib.metadata.version(name) for name in packages}
            | {"python": platform.python_version()},
            leaves=dict(digest.leaves),
            files=dict(files),
            scalars=dict(digest.scalars),
        )

    def write(self, folder: epath.Path) -> None:
        body = dataclasses.asdict(self)
        text = json.dumps({**body, "sha256": _checksum(body)}, indent=1)
        write_atomically(folder / NAME, text.encode())

    @classmethod
    def read(cls, folder: epath.Path, step: int) -> Self:
        """Raises BadCheckpoint when it is not as it was written or names files elsewhere, StorageError when newer code
        wrote it."""
        try:
            body = json.loads(_read(NAME, (folder / NAME).read_bytes))
            intact = body.pop("sha256") == _checksum(body)
        except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, not an object, no checksum
            intact = False
        if not intact:
            raise BadCheckpoint(f"{NAME} is not as it was written")
        try:
            if body["format"] > FORMAT:
                raise StorageError(f"{folder} has format {body['format']}, and {FORMAT} is the newest known: update lm")
            leaves = {
                path: LeafDigest(tuple(map(int, leaf["shape"])), leaf["dtype"], leaf["lanes"])
                for path, leaf in body["leaves"].items()
            }
            files = {name: FileChecksum(**file) for name, file in body["files"].items()}
            found = cls(**{**body, "leaves": leaves, "files": files})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadCheckpoint(f"{NAME} is none: {error!r}") from error
        if found.step != step:
            raise BadCheckpoint(f"it is the checkpoint of step {found.step}")
        _refuse_elsewhere(files)
        return found

    def lacks(self, path: str) -> bool:
        """Whether a leaf of this path came with a later format."""
        return any(path.startswith(start) for format in ADDED if format > self.format for start in ADDED[format])

    def verify(self, folder: epath.Path, *names: str) -> None:
        """Raises BadCheckpoint when a file (without names: any file) is not there as it was written."""
        verify(folder, {name: self.files[name] for name in names or self.files})


def verify(folder: epath.Path, files: Mapping[str, FileChecksum]) -> None:
    """Raises BadCheckpoint when one of these files is not there as it was written."""
    _refuse_links(folder, files)
    for name, expected in files.items():
        found = _read(name, functools.partial(FileChecksum.of, folder / name))
        if found.size != expected.size:
            raise BadCheckpoint(f"{name} has {found.size} bytes, {expected.size} were written")
        if found.sha256 != expected.sha256:
            raise BadCheckpoint(f"{name} is not as it was written")


def refuse_others(folder: epath.Path, name: str, files: Iterable[str]) -> None:
    """Raises BadCheckpoint when the folder of this name below holds more than these files: all of it is read."""
    found = _read(name, lambda: set(file_sizes(folder / name)) if (folder / name).exists() else set())
    found -= {file.removeprefix(f"{name}/") for file in files}
    if others := sorted(file for file in found if not file.startswith(".nfs")):  # which NFS keeps of what was removed
        raise BadCheckpoint(f"{name}/{others[0]} was not written by the save")


def shares(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The files in `count` parts of about the same size, for as many processes to read."""
    parts: list[list[str]] = [[] for _ in range(count)]
    loads = [(0, index) for index in range(count)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, index = heapq.heappop(loads)
        parts[index].append(name)
        heapq.heappush(loads, (load + sizes[name], index))
    return parts


def file_sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of all files below the folder, by path from there."""
    return {name: (folder / name).stat().length for name in sorted(_files(folder))}


def _read(name: str, read: Callable[[], R]) -> R:
    """Raises BadCheckpoint when it is missing, UnreadableCheckpoint when storage fails again and again."""
    for seconds in (*READ_WAITS, None):
        try:
            return read()
        except FileNotFoundError as error:
            raise BadCheckpoint(f"{name} is missing") from error
        except (IsADirectoryError, NotADirectoryError) as error:
            raise BadCheckpoint(f"{name} cannot be read: {reason(error)}") from error
        except Exception as error:  # storage libraries raise classes of their own beside OSError
            if seconds is None:
                raise UnreadableCheckpoint(f"{name} cannot be read: {reason(error)}") from error
            time.sleep(seconds)
    raise AssertionError


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _refuse_elsewhere(names: Iterable[str]) -> None:
    for name in names:
        if name != posixpath.normpath(name) or name.startswith(("/", "../")) or name in (".", "..") or "\0" in name:
            raise BadCheckpoint(f"{NAME} names a file that is not in the folder: {name!r}")


def _refuse_links(folder: epath.Path, names: Iterable[str]) -> None:
    """What is below the folder was written there; a link would be of whoever wants another file to be read."""
    if is_url(folder):
        return
    paths = [pathlib.PurePosixPath(name) for name in names]
    parts = {part for path in paths for part in (path, *path.parents)} - {pathlib.PurePosixPath()}
    for part in sorted(parts):
        if os.path.islink(folder / part):
            raise BadCheckpoint(f"{part} is a link")


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
