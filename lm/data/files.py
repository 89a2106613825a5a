"""Files of a corpus while it is built, by several processes and machines at once; local paths and bucket URLs alike."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from lm.data.remote import opened
from lm.errors import StorageError
from lm.files import is_url, write_atomically

LOCK = "build.lock"


def write_json(path: epath.Path, content: dict[str, Any]) -> None:
    """Like `write_atomically`, as JSON."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def temporary_for(path: epath.Path) -> Path:
    """A local file to write what `publish` will then put at `path`."""
    name = f"{path.name}.{platform.node()}.{os.getpid()}.tmp"  # machines may share a folder
    if is_url(path):
        return Path(tempfile.gettempdir()) / name
    return Path(os.fspath(path)).with_name(name)


def remove_abandoned(folder: epath.Path) -> None:
    """Removes, below a local folder, what `temporary_for` named in processes of this machine that are gone."""
    if is_url(folder):
        return
    for path in Path(os.fspath(folder)).rglob(f"*.{platform.node()}.*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def publish(temporary: Path, path: epath.Path) -> None:
    """Moves a finished local file to its final place, which may be in a bucket."""
    if is_url(path):
        epath.Path(temporary).copy(path, overwrite=True)
        temporary.unlink()
        return
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(os.fspath(path))


@contextlib.contextmanager
def sole_writer(
    folder: epath.Path, waiting: Callable[[], None], name: str = LOCK, *, shared: bool = False
) -> Iterator[None]:
    """Lets one process after the other write in a local folder; calls `waiting` if another one is in it.

    `shared`: others that say so too may be in it at the same time. The lock ends with the process that holds it,
    however that ends. A bucket has none.

    Raises:
        StorageError: the folder cannot be written.
    """
    if is_url(folder):
        yield
        return
    path = Path(os.fspath(folder)) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")  # NFS wants what is locked by several to be open for reading
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, kind)
        except OSError:
            pass  # some network file systems have no locks: better unguarded than not at all
        yield


def local_copy(path: epath.PathLike, size: int, digest: str) -> str:
    """The name of a local file with what is at `path`; of a file in a bucket a copy is made and kept.

    The copy is named by `digest`, which stands for the content, so a copy is never out of date.

    Raises:
        DataError: the file in the bucket cannot be read.
        OSError: there is no room for the copy.
    """
    if not is_url(path):
        return os.fspath(path)
    name = hashlib.sha256(f"{path}\0{digest}".encode()).hexdigest()[:32]
    copy = Path(tempfile.gettempdir()) / f"lm-data-{os.getuid()}" / name
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with copy.with_name(f"{name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever waited finds it there
        if not copy.exists() or copy.stat().st_size != size:
            temporary = copy.with_name(f"{name}.tmp")
            try:
                with opened(os.fspath(path), size) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 4 << 20)
                temporary.replace(copy)
            finally:
                temporary.unlink(missing_ok=True)  # a full disk needs the room
    return os.fspath(copy)
