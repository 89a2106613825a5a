"""metrics.jsonl, read: all of it, line by line, or what its end says, which is quick however long the run is."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import BinaryIO, NamedTuple, TypeVar

from etils import epath

from lm.errors import StorageError
from lm.files import reason

T = TypeVar("T")

RECENT = 20
"""Lines whose mean or median is what a run does now."""
_FIRST_BYTES = 2**16
_SEARCH_BYTES = 2**25
"""How far back a metric is looked for that is in few lines."""
_WORDS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


class Mark(NamedTuple):
    """Where in a run a line stands. Steps that are done again after a rewind come after those that they replace, and
    steps that are done again by a resumed run are the same ones."""

    rewinds: int
    step: int


class Line(NamedTuple):
    """What is logged for one step, counted from 0."""

    step: int
    values: Mapping[str, float | int]

    @property
    def mark(self) -> Mark:
        return Mark(int(self.values.get("rewinds", 0)), self.step)


def plain(value: T) -> T | str:
    """As it stands there: JSON has no words for numbers that are not finite, so they are strings."""
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def parsed(text: bytes) -> Line | None:
    """Of one line; None for what a crash has left of it. What is no number is left out."""
    try:
        fields = json.loads(text)
        step = fields.pop("step")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(step, int):
        return None
    numbers = ((name, _WORDS.get(value) if isinstance(value, str) else value) for name, value in fields.items())
    return Line(step, {name: number for name, number in numbers if isinstance(number, int | float)})


def read(path: str | os.PathLike[str]) -> tuple[list[Line], int]:
    """All lines, in order of their steps, and how many could not be read; none where there is no file.

    A last line without an end is being written, or was torn by a crash: it does not count.

    Raises:
      StorageError: the file cannot be read.
    """
    with _opened(path) as file:
        return _all(_whole(file.read(), from_start=True)) if file else ([], 0)


def recent(path: str | os.PathLike[str], count: int = RECENT) -> list[Line]:
    """The last lines, oldest first; as many as there are up to `count`. Raises as `read`."""
    with _opened(path) as file:
        for contents, from_start in _ends(file) if file else ():
            lines, _ = _all(_whole(contents, from_start))
            if len(lines) >= count or from_start:
                return lines[-count:]
    return []


def latest(path: str | os.PathLike[str], name: str) -> Line | None:
    """The last line that has this metric, if it is not too far back. Raises as `read`."""
    key = json.dumps(name).encode()
    with _opened(path) as file:
        for contents, from_start in _ends(file) if file else ():
            end = contents.rfind(b"\n")
            while (at := contents.rfind(key, 0, max(end, 0))) >= 0:  # much quicker than to look at each line
                begin = contents.rfind(b"\n", 0, at) + 1
                found = parsed(contents[begin : contents.index(b"\n", at)]) if begin or from_start else None
                if found is not None and name in found.values:
                    return found
                end = begin
            if len(contents) >= _SEARCH_BYTES:
                break
    return None


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO | None]:
    file = epath.Path(path)
    try:
        with file.open("rb") if file.exists() else contextlib.nullcontext() as opened:
            yield opened
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot read what the run logged, in {file}: {reason(error)}") from error


def _ends(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Its last bytes, more each time, and whether they are all of it."""
    size, length = file.seek(0, os.SEEK_END), _FIRST_BYTES
    while True:
        begin = max(size - length, 0)
        file.seek(begin)
        yield file.read(size - begin), begin == 0
        if begin == 0:
            return
        length *= 8


def _whole(contents: bytes, from_start: bool) -> list[bytes]:
    lines = contents.split(b"\n")[:-1]
    return lines if from_start else lines[1:]


def _all(lines: list[bytes]) -> tuple[list[Line], int]:
    found = [parsed(line) for line in lines if line.strip()]
    good = [line for line in found if line is not None]
    return good, len(found) - len(good)
