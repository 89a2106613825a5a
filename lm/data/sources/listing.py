"""The files that `data.paths` stands for, in a fixed order."""

from __future__ import annotations

import glob
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from etils import epath

from lm.data.files import is_remote
from lm.data.sources.arrow import saved_files
from lm.data.sources.stored import File
from lm.errors import DataError

STDLIB = "python-stdlib"


def list_files(paths: Iterable[str], holdout_paths: Iterable[str] = ()) -> list[File]:
    """All input files, each once, in an order that depends on names alone.

    A file that is named by both is held out. Hidden files (.name) in folders are left out.

    Raises:
        DataError: a path is missing, or there is no file in it.
    """
    found: dict[str, File] = {}
    for entry, heldout in [(p, True) for p in holdout_paths] + [(p, False) for p in paths]:
        for name, path in _stdlib() if entry == STDLIB else _expand(entry):
            if path not in found:
                size, modified = _stat(name, path)
                found[path] = File(entry, name, path, size, modified, heldout)
    return sorted(found.values(), key=lambda file: (file.heldout, file.name))


def present(entry: str) -> bool:
    """Whether an entry of `data.paths` is on this machine."""
    try:
        return entry == STDLIB or next(_expand(entry), None) is not None
    except DataError:
        return False


def _stdlib() -> Iterator[tuple[str, str]]:
    """(name, path) of the modules of the running interpreter's library."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for name in sorted(names):
            path = Path(folder) / name
            if name.endswith(".py") and path.is_file():  # distributions leave links to what is not installed
                yield f"{STDLIB}/{path.relative_to(root).as_posix()}", str(path)


def _expand(entry: str) -> Iterator[tuple[str, str]]:
    """(name, path) of the files that an entry of `data.paths` stands for."""
    path = epath.Path(entry).expanduser()
    try:
        is_folder = path.is_dir()
    except ImportError as error:  # of what reads this kind of bucket
        raise DataError(f"data.paths: {entry}: {error}") from None
    if is_folder:
        found = [os.fspath(path / relative) for relative in _walk(path)]
    elif path.exists():
        found = [os.fspath(path)]
    elif any(c in entry for c in "*?["):
        found = sorted(_glob(os.fspath(path)))
    else:
        raise DataError(f"data.paths: {entry}: no such file or folder")
    if not found:
        raise DataError(f"data.paths: {entry}: no files there (hidden ones are left out)")
    yield from zip(found, found, strict=True)


def _walk(folder: epath.Path) -> Iterator[PurePosixPath]:
    top = None
    for root, folders, names in folder.walk(on_error=_unreadable):
        here = PurePosixPath(root)
        top = top or here  # of a bucket without its scheme, so only what is below it counts
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        seen = [name for name in names if not name.startswith(".")]
        yield from (here.relative_to(top) / name for name in sorted(saved_files(folder / here.relative_to(top), seen)))


def _unreadable(error: OSError) -> None:
    raise DataError(f"data.paths: {error.filename}: cannot be read: {error.strerror}")


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if "**" in pattern:
        raise DataError(f"data.paths: {pattern}: ** is not for buckets; name the folder, all in it is read")
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    matches = epath.Path("/".join(parts[:fixed])).glob("/".join(parts[fixed:]))
    return [os.fspath(match) for match in matches if not match.is_dir()]


def _stat(name: str, path: str) -> tuple[int, int]:
    """Size and time of change, the latter in any unit."""
    if is_remote(path):
        remote = epath.Path(path).stat()
        return remote.length, int(remote.mtime)
    try:
        local = os.stat(path)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(local.st_mode):
        raise DataError(f"{name}: not a regular file; leave it out of data.paths")
    return local.st_size, local.st_mtime_ns
