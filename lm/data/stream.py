"""The tokens of a split as one long array that is read from its shards as needed."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools

import numpy as np
from etils import epath

from lm.data.manifest import SPLITS, Manifest, read_manifest
from lm.data.records import RECORD_TOKENS, ShardReader
from lm.errors import DataError

_OPEN_SHARDS = 64  # bounds files and memory whatever the number of shards
_RECORDS_KEPT = 1024  # 32 MB
_BEGIN = np.int32(-(2**31))  # marks, in the sign of a token, that it begins a document


class TokenStream:
    """Random access to the tokens of a split, documents one after the other in the order of the shards."""

    def __init__(self, directory: epath.PathLike, split: str, manifest: Manifest | None = None) -> None:
        """Raises DataError if there is no such split, or a shard is missing or of another size."""
        self._folder = epath.Path(directory)
        self.manifest = manifest or read_manifest(directory)
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")
        self._shards = self.manifest.splits[split]
        if not self._shards:
            raise DataError(f"{directory}: the {split} split is empty; see data.holdout_fraction")
        for shard in self._shards:
            path = self._folder / shard.file
            try:
                size = path.stat().length
            except OSError as error:
                raise DataError(f"{path}: shard cannot be read: {error.strerror or error}") from None
            if size != shard.size:
                raise DataError(f"{path}: {size} bytes instead of {shard.size}; damaged, build the data again")
        self._ends = list(itertools.accumulate(shard.tokens for shard in self._shards))
        self.tokens: int = self._ends[-1]
        self._reader = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open)
        self._record = functools.lru_cache(maxsize=_RECORDS_KEPT)(self._load)

    def read(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """int32 [count] tokens from position `start`, and bool [count] where documents begin."""
        if not 0 <= start <= start + count <= self.tokens:
            raise IndexError(f"tokens {start} to {start + count} of a stream of {self.tokens}")
        marked = np.empty(count, np.int32)
        self.fill(start, marked)
        return unmark(marked)

    def fill(self, start: int, marked: np.ndarray) -> None:
        """Fills the int32 [n] array with tokens from `start`, those that begin documents marked."""
        done, count = 0, len(marked)
        while done < count:
            shard = bisect.bisect_right(self._ends, start)
            in_shard = start - self._ends[shard] + self._shards[shard].tokens
            index, offset = divmod(in_shard, RECORD_TOKENS)
            piece = self._record(shard, index)[offset : offset + count - done]
            marked[done : done + len(piece)] = piece
            done += len(piece)
            start += len(piece)

    def document(self, position: int) -> int:
        """The index in the split of the document that the token at `position` belongs to."""
        shard = bisect.bisect_right(self._ends, position)
        in_shard = position - self._ends[shard] + self._shards[shard].tokens
        record = self._reader(shard).read(in_shard // RECORD_TOKENS)
        begun = int(np.searchsorted(record.starts, in_shard % RECORD_TOKENS, side="right"))
        earlier = sum(s.documents for s in self._shards[:shard])
        return earlier + record.first_document + begun - (record.first_offset == 0)

    def verify(self) -> None:
        """Reads everything; raises DataError naming the first shard that is not as it was written."""
        for i, shard in enumerate(self._shards):
            digest = hashlib.sha256()
            for index in range(shard.records):
                digest.update(self._reader(i).raw(index))
            if digest.hexdigest() != shard.sha256:
                raise DataError(f"{self._folder / shard.file}: changed since it was built; build again")

    def _open(self, shard: int) -> ShardReader:
        return ShardReader(self._folder / self._shards[shard].file, self._shards[shard])

    def _load(self, shard: int, index: int) -> np.ndarray:
        record = self._reader(shard).read(index)
        marked = record.tokens.astype(np.int32)
        marked[record.starts] |= _BEGIN
        return marked


def unmark(marked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens, and whether each begins a document."""
    return marked & ~_BEGIN, marked < 0
