"""A run on disk: where its files are, who may write them, and how they are written.

<run>/config.json      the resolved config
      checkpoints/     one folder per saved step
      tensorboard/     event files
      metrics.jsonl    one JSON object per logged step
      journal.jsonl    starts, ends, and where the time went
      now.json         while it runs: what it is doing
      log.txt          what the run printed
      trackers/        what was sent to which tracker, and what its library printed
      .lock            held by the process that writes the run
"""

import datetime
import errno
import fcntl
import os
import socket
import time
from typing import Self

from etils import epath

from lm.errors import ConfigError, StorageError
from lm.files import is_url, reason


class RunDirectory:
    """The locations of a run's files; inside `with`, also the sole right to write them.

    Entering creates the folders and takes the lock. The kernel frees the lock when the process ends in
    whatever way, so a killed run never has to be unlocked by hand. Nothing is created when another
    process has the lock. Buckets, and file systems without locks, are not protected.
    In a run of many processes, the one that writes the logs enters; the others only read the locations.

    Raises, on entering:
      ConfigError: another process has the lock, or the path is a file.
      StorageError: the directory cannot be created or written.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = epath.Path(path)
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.journal = self.path / "journal.jsonl"
        self.now = self.path / "now.json"
        self.log = self.path / "log.txt"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not is_url(self.path):
                self._take_lock()
            self.checkpoints.mkdir(exist_ok=True)
            self.tensorboard.mkdir(exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            self.__exit__()
            raise ConfigError(
                f"{error.filename or self.path} is a file, and a run needs a directory of its own: "
                "choose another run.dir"
            ) from error
        except ConfigError:
            raise
        except Exception as error:  # storage libraries raise classes of their own beside OSError
            self.__exit__()
            raise StorageError(f"cannot write the run directory {self.path}: {reason(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _take_lock(self) -> None:
        descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            raise ConfigError(
                f"{self.path} is in use by {holder or 'another process'}: wait until it ends, stop it "
                "(Ctrl-C or `kill` lets it save first), or choose another run.dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        self._lock = descriptor
        now = datetime.datetime.now(datetime.UTC)
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {now:%Y-%m-%d %H:%M:%S} UTC"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether a run was ever started in this directory."""
    return (epath.Path(path) / "config.json").is_file()


def is_held(path: str | os.PathLike[str]) -> bool | None:
    """Whether a process has the lock of this run directory.

    None where that cannot be known: in a bucket, and on file systems without locks. False may also mean that the file
    system does not tell this machine of the locks of others.
    """
    if is_url(path):
        return None
    try:
        descriptor = os.open(epath.Path(path) / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who look do not see each other
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_LOOKED_AT_SECONDS = 0.5
"""`is_held` has the lock for less than that: a run that starts meanwhile must not be told that it is in use."""


def _lock(descriptor: int) -> None:
    until = time.monotonic() + _LOOKED_AT_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
