"""The manifest of a checkpoint: what was saved, and how to tell that it is still that.

It holds two independent witnesses. The digest was computed on the devices from the arrays themselves; the
checksums were computed from the files, read back after they were written. Both are needed: Orbax loads a
flipped byte without a word, and sound files may hold something else than what was in memory.
"""

import dataclasses
import hashlib
import heapq
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from etils import epath

from lm.checkpoint.digest import LeafDigest, StateDigest
from lm.errors import StorageError
from lm.files import reason, write_atomically

NAME = "manifest.json"
FORMAT = 1  # of a checkpoint's folder; raise it when today's code could not read what is then written


class BadCheckpoint(Exception):
    """The files of a checkpoint are not what was saved."""


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
        )

    def write(self, folder: epath.Path) -> None:
        body = dataclasses.asdict(self)
        text = json.dumps({**body, "sha256": _checksum(body)}, indent=1)
        write_atomically(folder / NAME, text.encode())

    @classmethod
    def read(cls, folder: epath.Path, step: int) -> Self:
        """Raises BadCheckpoint when it is not as it was written, StorageError when newer code wrote it."""
        try:
            body = json.loads((folder / NAME).read_bytes())
            intact = body.pop("sha256") == _checksum(body)
        except OSError as error:
            raise BadCheckpoint(f"{NAME} cannot be read: {reason(error)}") from error
        except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, not an object, no checksum
            intact = False
        if not intact:
            raise BadCheckpoint(f"{NAME} is not as it was written")
        if body["format"] > FORMAT:
            raise StorageError(f"{folder} has format {body['format']}, and {FORMAT} is the newest known: update lm")
        if body["step"] != step:
            raise BadCheckpoint(f"it is the checkpoint of step {body['step']}")
        leaves = {
            path: LeafDigest(tuple(leaf["shape"]), leaf["dtype"], leaf["lanes"])
            for path, leaf in body["leaves"].items()
        }
        files = {name: FileChecksum(**file) for name, file in body["files"].items()}
        return cls(**{**body, "leaves": leaves, "files": files})

    def verify(self, folder: epath.Path, *names: str) -> None:
        """Raises BadCheckpoint when a file (without names: any file) is not there as it was written."""
        verify(folder, {name: self.files[name] for name in names or self.files})


def verify(folder: epath.Path, files: Mapping[str, FileChecksum]) -> None:
    """Raises BadCheckpoint when one of these files is not there as it was written."""
    for name, expected in files.items():
        try:
            found = FileChecksum.of(folder / name)
        except FileNotFoundError as error:
            raise BadCheckpoint(f"{name} is missing") from error
        except OSError as error:
            raise BadCheckpoint(f"{name} cannot be read: {reason(error)}") from error
        if found.size != expected.size:
            raise BadCheckpoint(f"{name} has {found.size} bytes, {expected.size} were written")
        if found.sha256 != expected.sha256:
            raise BadCheckpoint(f"{name} is not as it was written")


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


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _files(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name
