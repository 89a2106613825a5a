"""Files at URLs, through fsspec: listed and read so that no request is waited for without an end.

What file systems do about a server that is slow, or gone, differs and may be nothing. So here each request is given up
after a while, made again a few times, and in the end a DataError that names the file.
"""

from __future__ import annotations

import datetime
import fnmatch
import functools
import hashlib
import io
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from lm.errors import DataError

READ_SECONDS = 60.0
"""For the answer to a request for at most 16 MB."""
LIST_SECONDS = 300.0
"""For that to the request for what is in a folder, which may have a million files."""
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt."""

_MOST = 16 << 20
_WEB = ("http://", "https://")
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "http": "http", "https": "http", "hf": "hub"}
_VERSIONS = ("ETag", "etag", "blob_id", "md5Hash", "LastModified", "last_modified", "Last-Modified", "created")

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Entry:
    """A file or folder. `modified` changes when the file does; its unit is that of the file system."""

    url: str
    is_folder: bool
    size: int = 0
    modified: int = 0

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]


def entry(url: str) -> Entry | None:
    """What is at the URL now, None if nothing.

    Raises:
        DataError: what reads such URLs is not installed, or it cannot be reached.
    """
    if url.startswith(_WEB) and url.endswith("/"):
        return Entry(url, is_folder=True)  # a web server does not say, so the slash does
    fs, path = _file_system(url)
    fs.invalidate_cache()
    try:
        info = _patiently(url, "looking for it", READ_SECONDS, lambda: fs.info(path))
    except FileNotFoundError:
        return None
    return _entry(url, info)


def children(folder: Entry) -> list[Entry]:
    """What is in the folder itself, by name. Raises DataError as `entry` does."""
    fs, path = _file_system(folder.url)
    try:
        infos = _patiently(folder.url, "listing it", LIST_SECONDS, lambda: fs.ls(path, detail=True))
    except FileNotFoundError:
        infos = []
    found = {}
    for info in infos:
        stripped = info["name"].rstrip("/")
        name = stripped.rpartition("/")[2]
        # Buckets may hold an object for the folder; indexes of web servers link to other orders of themselves.
        if stripped == path.rstrip("/") or name.startswith("?"):
            continue
        url = folder.url + "/" * (not folder.url.endswith("/")) + name
        if info["type"] != "directory" and info.get("size") is None:
            info = _patiently(url, "looking for it", READ_SECONDS, functools.partial(fs.info, info["name"]))
        found[name] = _entry(url, info)
    return [found[name] for name in sorted(found)]


def below(folder: Entry) -> Iterator[tuple[Entry, list[Entry]]]:
    """Each folder from this one on down, and the files in it, without hidden ones."""
    inside = [child for child in children(folder) if not child.name.startswith(".")]
    yield folder, [child for child in inside if not child.is_folder]
    for child in inside:
        if child.is_folder:
            yield from below(child)


def glob(pattern: str) -> list[Entry]:
    """The files that match. As in `glob.glob`, ** stands for folders of any depth, and none of it for hidden files."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if set(part) & set("*?["))
    top = Entry("/".join([*parts[:fixed], ""]), is_folder=True)
    return list({found.url: found for found in _matching(top, parts[fixed:])}.values())


def opened(path: str, size: int | None = None, block: int = 4 << 20) -> BinaryIO:
    """The file at a local path or URL, which has `size` bytes, of which `block` are asked for at once.

    Raises:
        OSError: a local file cannot be opened.
        DataError: the file cannot be read, also of all that is read from it later.
    """
    if "://" not in path:
        return open(path, "rb")
    if size is None:
        there = entry(path)
        if there is None:
            raise DataError(f"{path}: no such file")
        size = there.size
    return io.BufferedReader(_Reader(path, size), block)


class _Reader(io.RawIOBase):
    def __init__(self, url: str, size: int) -> None:
        self._url, self._size = url, size
        self._fs, self._path = _file_system(url)
        self._handle: Any = None
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, count = self._position, min(len(buffer), _MOST, self._size - self._position)
        if count <= 0:
            return 0
        try:
            data = _patiently(self._url, f"reading at byte {start}", READ_SECONDS, lambda: self._range(start, count))
        except FileNotFoundError:
            raise DataError(f"{self._url}: gone") from None
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _range(self, start: int, count: int) -> bytes:
        handle, self._handle = self._handle, None  # one that failed, or never answered, is not used again
        if handle is None:
            handle = self._fs.open(self._path, "rb", cache_type="none")
        handle.seek(start)
        data = handle.read(count)
        if not data:
            raise OSError(f"it ends at byte {start}, not {self._size}")
        self._handle = handle
        return data


def _matching(folder: Entry, parts: Sequence[str]) -> Iterator[Entry]:
    head, *rest = parts
    if head == "**":
        yield from _matching(folder, rest or ["*"])
        for child in children(folder):
            if child.is_folder and not child.name.startswith("."):
                yield from _matching(child, parts)
        return
    for child in children(folder):
        if child.name.startswith(".") > head.startswith(".") or not fnmatch.fnmatchcase(child.name, head):
            continue
        if not rest and not child.is_folder:
            yield child
        elif rest and child.is_folder:
            yield from _matching(child, rest)


def _file_system(url: str) -> tuple[Any, str]:
    """What reads the URL, and what it calls it."""
    import fsspec

    scheme = url.partition("://")[0]
    try:
        # Some look for credentials over the network.
        return _within(READ_SECONDS, lambda: fsspec.core.url_to_fs(url))
    except ImportError as error:
        extra = f": pip install 'lm[{_EXTRAS[scheme]}]'" if scheme in _EXTRAS else ""
        raise DataError(f"{url}: {error}{extra}") from None
    except Exception as error:
        raise DataError(f"{url}: cannot be reached: {_describe(error)}") from None


def _entry(url: str, info: dict[str, Any]) -> Entry:
    if info["type"] == "directory":
        return Entry(f"{url}/" if url.startswith(_WEB) else url, is_folder=True)
    if info.get("size") is None:
        raise DataError(f"{url}: its server does not say how long it is; download it, and name the local file")
    return Entry(url, False, int(info["size"]), _modified(info))


def _modified(info: dict[str, Any]) -> int:
    match info.get("mtime"):
        case datetime.datetime() as time_:
            return int(time_.timestamp())
        case int() | float() as seconds:
            return int(seconds)
    version = next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), None)
    return int.from_bytes(hashlib.sha256(version.encode()).digest()[:6], "big") if version else 0


def _patiently(url: str, doing: str, seconds: float, request: Callable[[], _Result]) -> _Result:
    """Raises FileNotFoundError if there is no such file, and DataError if all else fails."""
    for attempt, wait in enumerate((*WAITS, None), 1):
        try:
            return _within(seconds, request)
        except DataError:
            raise
        except Exception as error:  # the libraries behind fsspec have no common one
            problem = _describe(error)
            if _is_missing(error):
                raise FileNotFoundError(problem) from None
            if _is_final(error):
                raise DataError(f"{url}: {doing} failed: {problem}") from None
            if wait is None:
                raise DataError(f"{url}: {doing} failed {attempt} times, at last with: {problem}") from None
        _log.warning("%s: %s failed: %s; trying again in %g s", url, doing, problem, wait)
        time.sleep(wait)
    raise AssertionError("not reached")


def _within(seconds: float, request: Callable[[], _Result]) -> _Result:
    """In a thread, which is left behind if there is no answer in time: nothing else ends every kind of wait."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((request(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def _is_missing(error: BaseException) -> bool:
    cause, status = _cause(error)
    return status == 404 if status else isinstance(cause, FileNotFoundError)


def _is_final(error: BaseException) -> bool:
    """Whether the same request would fail again: not that the server is busy, or that the network is down."""
    cause, status = _cause(error)
    if status:
        return 400 <= status < 500 and status not in (408, 429)
    return isinstance(cause, (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, ImportError))


def _cause(error: BaseException) -> tuple[BaseException, int]:
    """What is behind the error, and the HTTP status, if any: what fsspec calls not found may be any failure."""
    cause = error.__cause__ or error
    response = getattr(cause, "response", None)
    if isinstance(response, dict):  # of botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(cause, "status", None) or getattr(response, "status_code", None)
    return cause, status if isinstance(status, int) else 0


def _describe(error: BaseException) -> str:
    cause, _ = _cause(error)
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
