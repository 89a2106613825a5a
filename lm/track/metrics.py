"""metrics.jsonl, read while it grows, and is cut back, and its last line is written anew."""

import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from lm.files import is_url
from lm.track.tracker import Line, Mark

NOTHING = Mark(0, -1)


class Metrics:
    """Reads what is new, and all again when what was read before has changed."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._offset, self._last = 0, b""

    def after(self, mark: Mark, *, hold: int | None) -> Iterator[Line]:
        """The whole lines after `mark`, oldest first; all are to be taken. Not that of step `hold`: it may change."""
        for raw in self._raw():
            line = _parsed(raw)
            if line is not None and line.mark.step == hold:
                return
            self._offset, self._last = self._offset + len(raw), raw
            if line is not None and line.mark > mark:
                yield line

    def _raw(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        if is_url(self._path):
            contents = self._path.read_bytes()
            begin = self._offset - len(self._last)
            if contents[begin : self._offset] != self._last:
                self._offset, self._last = 0, b""
            lines: Any = contents[self._offset :].splitlines(keepends=True)
            yield from (line for line in lines if line.endswith(b"\n"))
            return
        with open(self._path, "rb") as file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                file.seek(0)
                self._offset, self._last = 0, b""
            yield from (line for line in file if line.endswith(b"\n"))


def _parsed(raw: bytes) -> Line | None:
    """None for what a crash has left of a line."""
    try:
        values = json.loads(raw)
        step = int(values.pop("step"))
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        return Line(Mark(int(numbers.get("rewinds", 0)), step), numbers)  # float reads "NaN" and "Infinity"
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
