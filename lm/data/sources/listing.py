"""The files that `data.paths` stands for, in a fixed order."""

from __future__ import annotations

import glob
import os
import re
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from lm.data import remote
from lm.data.sources.arrow import DESCRIPTIONS, saved_files
from lm.data.sources.stored import File, TokenFormat
from lm.errors import DataError
from lm.files import is_url

STDLIB = "python-stdlib"

_HUB_DATA = re.compile(r"\.(parquet|arrow|array_?record|(jsonl|txt)(\.gz|\.zst)?)$")
_HUB_HINT = "a dataset is hf://datasets/NAMESPACE/NAME[@REVISION][/FOLDER or glob]; a private one needs `hf auth login`"


def list_files(
    paths: Iterable[str], holdout_paths: Iterable[str] = (), tokens: TokenFormat | None = None
) -> list[File]:
    """All input files, each once, in an order that depends on names alone.

    A file that is named by both is held out. Hidden files (.name) in folders are left out, and what is no data in
    folders of the Hugging Face hub. Of folders of `tokens`, the .bin files are taken.

    Raises:
        DataError: a path is missing or cannot be reached, or there is no file in it.
    """
    found: dict[str, File] = {}
    for entry, heldout in [(p, True) for p in holdout_paths] + [(p, False) for p in paths]:
        if is_url(entry):
            for there in _remote(entry, tokens):
                file = File(entry, there.url, there.url, there.size, there.modified, heldout, tokens)
                found.setdefault(there.url, file)
            continue
        for name, path in _stdlib() if entry == STDLIB else _local(entry, tokens):
            if path not in found:
                found[path] = File(entry, name, path, *_stat(name, path), heldout, tokens)
    return sorted(found.values(), key=lambda file: (file.heldout, file.name))


def present(entry: str) -> bool:
    """Whether an entry of `data.paths` is on this machine."""
    try:
        return entry == STDLIB or next(iter(_remote(entry) if is_url(entry) else _local(entry)), None) is not None
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


def _local(entry: str, tokens: TokenFormat | None = None) -> Iterator[tuple[str, str]]:
    """(name, path) of the files that an entry of `data.paths` stands for."""
    path = Path(entry).expanduser()
    if path.is_dir():
        found = list(_walk(path, tokens))
    elif path.exists():
        found = [os.fspath(path)]
    elif _is_glob(entry):
        found = sorted(name for name in glob.glob(os.fspath(path), recursive=True) if os.path.isfile(name))
    else:
        raise DataError(f"data.paths: {entry}: no such file or folder")
    if not found:
        raise _nothing(entry, tokens)
    yield from zip(found, found, strict=True)


def _walk(top: Path, tokens: TokenFormat | None) -> Iterator[str]:
    for root, folders, names in os.walk(top, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(_of_folder(root, [name for name in names if not name.startswith(".")], tokens)):
            yield os.path.join(root, name)


def _unreadable(error: OSError) -> None:
    raise DataError(f"data.paths: {error.filename}: cannot be read: {error.strerror}")


def _remote(entry: str, tokens: TokenFormat | None = None) -> list[remote.Entry]:
    """Like `_local`, at a URL."""
    there = remote.entry(entry)
    if there is not None and not there.is_folder:
        return [there]
    if there is not None:
        found = []
        for folder, inside in remote.below(there):
            by_name = {child.name: child for child in inside}
            for name in _of_folder(folder.url, list(by_name), tokens):
                if name not in by_name:
                    raise DataError(f"{folder.url}/{name}: part of a saved dataset, but not there")
                found.append(by_name[name])
    elif _is_glob(entry):
        found = remote.glob(entry)
    else:
        hub = f"; {_HUB_HINT}" if entry.startswith("hf://") else ""
        raise DataError(f"data.paths: {entry}: no such file or folder{hub}")
    if not found:
        raise _nothing(entry, tokens)
    return found


def _of_folder(folder: str, names: list[str], tokens: TokenFormat | None) -> list[str]:
    """Those of the names in the folder that are read."""
    if tokens:
        return [name for name in names if name.endswith(".bin")]
    if folder.startswith("hf://") and not DESCRIPTIONS.issubset(names):
        return [name for name in names if _HUB_DATA.search(name)]
    return saved_files(folder, names)


def _is_glob(entry: str) -> bool:
    return any(c in entry for c in "*?[")


def _nothing(entry: str, tokens: TokenFormat | None) -> DataError:
    kind = ".bin files" if tokens else "data files" if entry.startswith("hf://") else "files"
    return DataError(f"data.paths: {entry}: no {kind} there (hidden ones are left out)")


def _stat(name: str, path: str) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds."""
    try:
        local = os.stat(path)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(local.st_mode):
        raise DataError(f"{name}: not a regular file; leave it out of data.paths")
    return local.st_size, local.st_mtime_ns
