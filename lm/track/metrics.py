"""metrics.jsonl, read while it grows, and is cut back, and its last line is written anew."""

from collections.abc import Iterator
from typing import Any

from etils import epath

from lm.files import is_url
from lm.train.metrics import Line, Mark, parsed

NOTHING = Mark(0, -1)


class Metrics:
    """Reads what is new, and all again when what was read before has changed."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._offset, self._last = 0, b""

    def after(self, mark: Mark, *, hold: int | None) -> Iterator[Line]:
        """The whole lines after `mark`, oldest first; all are to be taken. Not that of step `hold`: it may change."""
        for raw in self._raw():
            line = parsed(raw)
            if line is not None and line.step == hold:
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
