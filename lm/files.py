"""Files that are written whole or not at all, and logs that grow; local paths and bucket URLs alike."""

import contextlib
import logging
import os
import platform
import re
import threading
from collections.abc import Callable
from typing import Protocol

from etils import epath

from lm.errors import StorageError

# gcsfs logs a page for each failure that it also raises, and what is raised is reported in a line.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
# tensorstore, by which Orbax reads and writes buckets, waits for an answer for ever, and one that was lost would hold a
# save up until the run is ended. Where nothing comes for so long, it now asks again.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")

UPLOAD_SECONDS = 30.0  # an object in a bucket cannot grow: it is written again, whole, at most this often


def write_atomically(path: str | os.PathLike[str], contents: bytes) -> None:
    """Replaces the file in one step: after a kill or power loss it is the old one or the new one, whole.

    Raises:
      StorageError: it could not be written; the old file is as it was.
    """
    target = epath.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_url(target):
            target.write_bytes(contents)  # a bucket shows an object only when it is complete
        else:
            _replace_local(target, contents)
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot write {target}: {reason(error)}") from error


def write_unless_there(path: str | os.PathLike[str], contents: bytes) -> None:
    """As `write_atomically`; a disk that is full does not matter when the file is as it should be already."""
    with contextlib.suppress(Exception):
        if epath.Path(path).read_bytes() == contents:
            return
    write_atomically(path, contents)


class AppendOnlyFile:
    """A log file that grows by whole records and never stops a run.

    A record that was appended survives the death of the process (in a bucket, where the file is uploaded
    every UPLOAD_SECONDS, the latest do not), and one that does not fit leaves nothing of itself behind.
    Nothing here raises: the first failure is given to `report`, and later records are still tried. All
    methods may be called from any thread.
    """

    def __init__(self, path: str | os.PathLike[str], report: Callable[[str], None]):
        self.path = epath.Path(path)
        self._file: _File = _BucketFile(self.path) if is_url(self.path) else _LocalFile(self.path)
        self._report = report
        self._failed = False
        self._mutex = threading.RLock()  # re-entrant: what reports may itself append

    def append(self, record: bytes) -> None:
        self._try(lambda: self._file.append(record))

    def truncate(self, size: int) -> None:
        """Drops everything after the first `size` bytes."""
        self._try(lambda: self._file.truncate(size))

    def replace(self, contents: bytes) -> None:
        """Writes the whole file anew: what fails, or is interrupted, leaves the old one as it was."""
        self._try(lambda: self._file.replace(contents))

    def replace_last(self, change: Callable[[bytes], bytes]) -> None:
        """Like `replace`, with what `change` makes of the last line (of nothing, when there is none) in its place."""

        def replace() -> None:
            contents = self._file.contents()
            begin = contents.rfind(b"\n", 0, -1) + 1
            self._file.replace(contents[:begin] + change(contents[begin:]))

        self._try(replace)

    def close(self) -> None:
        self._try(self._file.close)

    def _try(self, write: Callable[[], None]) -> None:
        with self._mutex:
            try:
                write()
            except Exception as error:
                if not self._failed:
                    self._failed = True
                    self._report(
                        f"cannot write {self.path}: {reason(error)}; the run goes on, "
                        "what cannot be written is missing there"
                    )


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether the path is a URL such as gs://bucket/file."""
    return "://" in os.fspath(path)


def reason(error: Exception) -> str:
    """One line for a failure of storage, whose libraries raise classes of their own and write pages."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    if number := re.search(r"\[os_error_code='(\d+)'\]", text):  # of tensorstore, at the end of a page
        return os.strerror(int(number[1]))
    return text.splitlines()[0][:300]


class _File(Protocol):
    def contents(self) -> bytes: ...
    def append(self, record: bytes) -> None: ...
    def truncate(self, size: int) -> None: ...
    def replace(self, contents: bytes) -> None: ...
    def close(self) -> None: ...


class _LocalFile:
    def __init__(self, path: epath.Path):
        self._path = path
        self._descriptor: int | None = None

    def append(self, record: bytes) -> None:
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(self._descriptor).st_size
        try:
            while record:
                record = record[os.write(self._descriptor, record) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise

    def contents(self) -> bytes:
        return self._path.read_bytes() if self._path.exists() else b""

    def truncate(self, size: int) -> None:
        os.truncate(self._path, size)

    def replace(self, contents: bytes) -> None:
        _replace_local(self._path, contents)
        self.close()  # the descriptor is of the old file: the next append opens the new one

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


class _BucketFile:
    def __init__(self, path: epath.Path):
        self._path = path
        self._contents: bytearray | None = None
        self._changed = False
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._uploader: threading.Thread | None = None

    def append(self, record: bytes) -> None:
        self._loaded().extend(record)
        self._changed = True
        if self._uploader is None:
            self._uploader = threading.Thread(target=self._upload_now_and_then, daemon=True)
            self._uploader.start()
        error, self._error = self._error, None
        if error:
            raise error

    def contents(self) -> bytes:
        return bytes(self._loaded())

    def truncate(self, size: int) -> None:
        del self._loaded()[size:]
        self._changed = True

    def replace(self, contents: bytes) -> None:
        self._loaded()[:] = contents  # in one step: an upload may be reading it
        self.append(b"")

    def close(self) -> None:
        self._closing.set()
        if self._uploader is not None:
            self._uploader.join()
        self._uploader = None
        self._closing.clear()
        self._upload()

    def _loaded(self) -> bytearray:
        if self._contents is None:
            self._contents = bytearray(self._path.read_bytes() if self._path.exists() else b"")
        return self._contents

    def _upload_now_and_then(self) -> None:
        while not self._closing.wait(UPLOAD_SECONDS):
            try:
                self._upload()
            except Exception as error:
                self._error = error

    def _upload(self) -> None:
        if not self._changed or self._contents is None:
            return
        self._changed = False  # before the copy: what comes during the upload must be uploaded again
        try:
            self._path.write_bytes(bytes(self._contents))
        except BaseException:
            self._changed = True
            raise


def _replace_local(target: epath.Path, contents: bytes) -> None:
    # Not named after the target: TensorBoard reads every file with "tfevents" in its name. Machines may share a folder,
    # and their processes have the same numbers in containers.
    temporary = target.with_name(f".{threading.get_ident()}.{platform.node()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(target.parent)


def _sync_directory(path: epath.Path) -> None:
    """The new name is on the disk only when its directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
