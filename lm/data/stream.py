"""The tokens of a split as one long array that is read from its shards as needed."""

from __future__ import annotations

import bisect
import concurrent.futures
import functools
import itertools

import numpy as np
from etils import epath

from lm.data.manifest import SPLITS, Manifest, read_manifest
from lm.data.reading import Reads
from lm.data.records import RECORD_TOKENS, Shard, ShardReader, read_lengths
from lm.errors import DataError

_OPEN_SHARDS = 256  # of the 1024 files that a process may have open on most systems
_RECORDS_KEPT = 2048  # 32 MB, or 64 MB of ids of 4 bytes
_LENGTHS_KEPT = 256  # shards: some 20,000 documents each
_BEGIN = np.int32(-(2**31))  # marks, in the sign of a token, that it begins a document


class Shelf:
    """Shards that are open and records that were read last, of all streams that share it.

    It bounds files and memory whatever the number of streams and shards.
    """

    def __init__(self) -> None:
        self.reads = Reads()
        self.reader = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._reader)
        self.record = functools.lru_cache(maxsize=_RECORDS_KEPT)(self._record)
        self.starts = functools.lru_cache(maxsize=_LENGTHS_KEPT)(self._starts)

    def _reader(self, where: _Place) -> ShardReader:
        return ShardReader(where.path, where.shard, where.source, self.reads)

    def _record(self, where: _Place, index: int) -> tuple[np.ndarray, list[int]]:
        record = self.reader(where).read(index)
        return record.tokens, record.starts.tolist()  # a list, as few of them are looked at

    def _starts(self, where: _Place) -> np.ndarray:
        lengths = read_lengths(where.path, where.shard, lambda: self.reader(where).lengths(), self.reads)
        return np.cumsum(lengths) - lengths


class _Place:
    """A shard and where it lies; itself alone, so that it is found fast in a cache."""

    def __init__(self, path: epath.Path, shard: Shard, source: str) -> None:
        self.path, self.shard, self.source = path, shard, source


class TokenStream:
    """Random access to the tokens of a split, documents one after the other in the order of the shards."""

    def __init__(
        self,
        directory: epath.PathLike,
        split: str,
        manifest: Manifest | None = None,
        shelf: Shelf | None = None,
        source: str = "",
    ) -> None:
        """Nothing is opened before it is read. Raises DataError if there is no such split, or nothing in it."""
        folder = epath.Path(directory)
        self.manifest = manifest or read_manifest(directory)
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")
        self._shards = self.manifest.splits[split]
        if not self._shards:
            raise DataError(f"{directory}: the {split} split is empty; see data.holdout_fraction")
        self._places = [_Place(folder / shard.file, shard, source) for shard in self._shards]
        self._ends = list(itertools.accumulate(shard.tokens for shard in self._shards))
        self.tokens: int = self._ends[-1]
        self._shelf = shelf or Shelf()
        self._record = self._shelf.record

    def check_files(self) -> None:
        """Raises DataError if a shard is missing or of another size than when it was built."""
        with concurrent.futures.ThreadPoolExecutor(16) as pool:  # a bucket takes its time to answer
            for _ in pool.map(_check_size, self._places):
                pass

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 [count] tokens from position `start`, and bool [count] where documents begin."""
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.tokens}")
        marked = np.empty(count, np.int32)
        self.fill(start, marked)
        return unmark(marked)

    def fill(self, start: int, marked: np.ndarray) -> None:
        """Fills the int32 [n] array with tokens from `start`, those that begin documents marked.

        The end of the stream is followed by its beginning.
        """
        done, count = 0, len(marked)
        start %= self.tokens
        while done < count:
            shard = bisect.bisect_right(self._ends, start)
            in_shard = start - self._ends[shard] + self._shards[shard].tokens
            index, offset = divmod(in_shard, RECORD_TOKENS)
            tokens, begins = self._record(self._places[shard], index)
            stop = min(offset + count - done, len(tokens))
            marked[done : done + stop - offset] = tokens[offset:stop]
            for begin in begins[bisect.bisect_left(begins, offset) : bisect.bisect_left(begins, stop)]:
                marked[done + begin - offset] |= _BEGIN
            done += stop - offset
            start = (start + stop - offset) % self.tokens

    def document(self, position: int) -> int:
        """The index in the split of the document that the token at `position` belongs to."""
        shard = bisect.bisect_right(self._ends, position)
        in_shard = position - self._ends[shard] + self._shards[shard].tokens
        inside = np.searchsorted(self._shelf.starts(self._places[shard]), in_shard, side="right") - 1
        return sum(s.documents for s in self._shards[:shard]) + int(inside)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """int64 [n] positions from `start` up to `stop` at which documents begin, ascending."""
        found = []
        shard = bisect.bisect_right(self._ends, start)
        while shard < len(self._shards) and (begin := self._ends[shard] - self._shards[shard].tokens) < stop:
            starts = self._shelf.starts(self._places[shard])
            first, last = starts.searchsorted((start - begin, stop - begin)).tolist()
            found.append(starts[first:last] + begin)
            shard += 1
        return found[0] if len(found) == 1 else np.concatenate([np.zeros(0, np.int64), *found])

    def verify(self) -> None:
        """Reads everything; raises DataError naming the first shard that is not as it was written."""
        for where in self._places:
            self._shelf.reader(where).verify()


def _check_size(where: _Place) -> None:
    try:
        size = where.path.stat().length
    except OSError as error:
        raise DataError(f"{where.path}: shard cannot be read: {error.strerror or error}") from None
    if size != where.shard.size:
        raise DataError(f"{where.path}: {size} bytes instead of {where.shard.size}; damaged, build the data again")


def unmark(marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens, and whether each begins a document."""
    return marked & ~_BEGIN, marked < 0
