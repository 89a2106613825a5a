"""`python faulty_disk.py FOLDER MOUNTED RULES`: a file system that shows a folder, and fails or waits where told to.

RULES is a file with a JSON list, read at each operation; the first rule that fits decides:

    {"on": ["write", "fsync"], "below": "run/checkpoints/6", "fails": "EIO", "after": 10, "seconds": 0.5}

`below` is the beginning of paths; `fails` names an error of errno; of `seconds` it waits before; the first `after`
operations that fit are done as they should be.
"""

import errno
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mfusepy


class FaultyDisk(mfusepy.Operations):
    use_ns = True

    def __init__(self, folder: Path, rules: Path):
        self._folder, self._rules = folder.resolve(strict=True), rules.resolve(strict=True)
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _met(self, operation: str, path: str) -> Path:
        """Where the file really is, unless the rules say otherwise. Never outside the folder."""
        place = path.removeprefix("/")
        for rule in json.loads(self._rules.read_text()):
            if operation in rule["on"] and place.startswith(rule["below"]):
                with self._lock:
                    self._seen[key := json.dumps(rule)] += 1
                    late = self._seen[key] > rule.get("after", 0)
                if late:
                    time.sleep(rule.get("seconds", 0))
                    if "fails" in rule:
                        raise mfusepy.FuseOSError(getattr(errno, rule["fails"]))
                break
        found = self._folder / place
        if ".." in found.parts or found.is_symlink():
            raise mfusepy.FuseOSError(errno.EPERM)
        return found

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = os.lstat(self._met("getattr", path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_blocks")
        times = {f"st_{x}time": getattr(found, f"st_{x}time_ns") for x in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._met("readdir", path))]

    def open(self, path: str, flags: int) -> int:
        return os.open(self._met("open", path), flags & ~os.O_APPEND)  # the kernel says where to write

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        return os.open(self._met("create", path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._met("read", path)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        self._met("write", path)
        return os.pwrite(fh, data, offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        os.truncate(self._met("truncate", path), length)
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        self._met("fsync", path)
        os.fsync(fh)
        return 0

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def rename(self, old: str, new: str) -> int:
        os.rename(self._met("rename", old), self._met("rename", new))
        return 0

    def unlink(self, path: str) -> int:
        os.unlink(self._met("unlink", path))
        return 0

    def mkdir(self, path: str, mode: int) -> int:
        os.mkdir(self._met("mkdir", path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        os.rmdir(self._met("rmdir", path))
        return 0

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._met("statfs", path))
        return {name: getattr(found, name) for name in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_files")}


if __name__ == "__main__":
    folder, mounted, rules = map(Path, sys.argv[1:])
    mfusepy.FUSE(FaultyDisk(folder, rules), str(mounted), foreground=True, nothreads=False)
