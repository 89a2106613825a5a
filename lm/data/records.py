"""The format of the built files: the documents of a shard as one stream of tokens, cut into records.

A document is its begin token, its text's tokens and its end token. The stream is cut every
RECORD_TOKENS tokens whatever the documents' lengths, so that position p of the stream is found in
record p // RECORD_TOKENS without an index, and documents may be of any length.
"""

from __future__ import annotations

import array
import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lm.data import files
from lm.data.reading import Damage, Reads
from lm.errors import DataError, StorageError

FORMAT = 1
RECORD_TOKENS = 8192

# format, bytes per token, tokens, starts, index in the shard of the document that the first token
# belongs to, position of the first token in that document; then starts (uint32), then tokens.
_HEADER = struct.Struct("<HHIIIQQ")

# One record per chunk, not compressed: a random read touches nothing else.
_WRITE_OPTIONS = "group_size:1,uncompressed"
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"

_REMAKE = "delete it, it is made from the shard then"


@dataclass(frozen=True)
class Shard:
    """What the manifest says of one file. `sha256` is of its records' contents, one after the other."""

    file: str
    tokens: int
    records: int
    documents: int
    text_bytes: int
    size: int
    sha256: str


class Record(NamedTuple):
    tokens: np.ndarray
    """[n] uint16 or uint32."""
    starts: np.ndarray
    """uint32: where in `tokens` documents begin."""


class ShardWriter:
    """Writes one shard, and beside it how long its documents are; both appear when `close` is called."""

    def __init__(self, path: epath.Path, dtype: np.dtype) -> None:
        self._path = path
        self._temporary = files.temporary_for(path)
        self._file = array_record_module.ArrayRecordWriter(str(self._temporary), _WRITE_OPTIONS)
        self._tokens = np.zeros(RECORD_TOKENS, dtype.newbyteorder("<"))
        self._filled = 0
        self._starts: list[int] = []
        self._lengths = array.array("I")
        self._first = (0, 0)
        self._digest = hashlib.sha256()
        self._totals = {"tokens": 0, "records": 0, "documents": 0, "text_bytes": 0}

    def add(self, document: np.ndarray, text_bytes: int) -> None:
        """Appends the int [n] tokens of a document, specials included."""
        self._starts.append(self._filled)
        done = 0
        while done < len(document):
            if self._filled == 0:
                self._first = (self._totals["documents"], done)
            count = min(RECORD_TOKENS - self._filled, len(document) - done)
            self._tokens[self._filled : self._filled + count] = document[done : done + count]
            self._filled += count
            done += count
            if self._filled == RECORD_TOKENS:
                self._flush()
        self._lengths.append(len(document))
        self._totals["tokens"] += len(document)
        self._totals["documents"] += 1
        self._totals["text_bytes"] += text_bytes

    def close(self) -> Shard:
        """Ends the file and gives what the manifest needs. Raises StorageError if it cannot be written."""
        if self._filled:
            self._flush()
        try:
            self._file.close()
            size = self._temporary.stat().st_size
            files.write_atomically(lengths_file(self._path), np.array(self._lengths, "<u4").tobytes())
            files.publish(self._temporary, self._path)
        except (RuntimeError, OSError) as error:
            raise StorageError(f"cannot write {self._path}: {error}") from None
        return Shard(self._path.name, size=size, sha256=self._digest.hexdigest(), **self._totals)

    def _flush(self) -> None:
        tokens = self._tokens[: self._filled]
        starts = np.array(self._starts, "<u4")
        header = _HEADER.pack(FORMAT, tokens.itemsize, tokens.size, starts.size, 0, *self._first)
        record = header + starts.tobytes() + tokens.tobytes()
        self._digest.update(record)
        try:
            self._file.write(record)
        except (RuntimeError, OSError) as error:
            raise StorageError(f"cannot write {self._path}: {error}") from None
        self._totals["records"] += 1
        self._filled = 0
        self._starts = []


def lengths_file(path: epath.Path) -> epath.Path:
    """What lies beside a shard: uint32 tokens of each of its documents."""
    return path.with_suffix(".lengths")


def read_lengths(path: epath.Path, shard: Shard, missing: Callable[[], np.ndarray], reads: Reads) -> np.ndarray:
    """int64 [documents] of the shard at `path`; of one that was built without them, what `missing` gives."""
    file = lengths_file(path)
    try:
        stored = reads(str(file), file.read_bytes)
    except FileNotFoundError:
        return missing()
    lengths = np.frombuffer(stored[: len(stored) // 4 * 4], "<u4").astype(np.int64)
    if len(stored) != 4 * shard.documents or lengths.sum() != shard.tokens:
        raise DataError(f"{file}: damaged or of another build; {_REMAKE}")
    return lengths


class ShardReader:
    """Random access to the records of one shard. A read that fails is tried again, of the file opened anew."""

    def __init__(self, path: epath.Path, shard: Shard, source: str = "", reads: Reads | None = None) -> None:
        """Messages name the `source`, if it has a name. Raises DataError if the file cannot be opened."""
        self._path, self._shard, self._reads = os.fspath(path), shard, reads or Reads()
        self._name = f"source {source}: {self._path}" if source else self._path
        self._file: Any = None
        self._reads(self._name, self._open)

    def read(self, index: int) -> Record:
        """Raises DataError naming shard and record if it does not hold what was written."""
        return self._read(index)[1]

    def lengths(self) -> np.ndarray:
        """int64 [documents], by reading all of it. Raises DataError if that is not what was written."""
        starts, digest = [], hashlib.sha256()
        for index in range(self._shard.records):
            raw, record = self._read(index)
            digest.update(raw)
            starts.append(record.starts.astype(np.int64) + index * RECORD_TOKENS)
        if digest.hexdigest() != self._shard.sha256:
            raise DataError(f"{self._name}: changed since it was built; build again")
        return np.diff(np.concatenate([*starts, [self._shard.tokens]]))

    def verify(self) -> None:
        """Raises DataError if it, or what lies beside it, is not what was written."""
        path, lengths = epath.Path(self._path), self.lengths()
        if not np.array_equal(read_lengths(path, self._shard, lambda: lengths, self._reads), lengths):
            raise DataError(f"{lengths_file(path)}: not the lengths of the documents in {self._name}; {_REMAKE}")

    def _read(self, index: int) -> tuple[bytes, Record]:
        """As it is stored, and what that says."""

        def read() -> tuple[bytes, Record]:
            raw = self._stored(index)
            return raw, _parsed(raw)

        return self._reads(f"{self._name}: record {index}", read)

    def _open(self) -> None:
        local = files.local_copy(self._path, self._shard.size, self._shard.sha256)
        if not os.path.exists(local):  # the library would say that it is empty; it was there, and may come back
            raise OSError("there is no such file; bring it back, or build the data again")
        file = array_record_module.ArrayRecordReader(local, _READ_OPTIONS)
        if (count := file.num_records()) != self._shard.records:
            raise Damage(f"damaged ({count} records instead of {self._shard.records}); build the data again")
        self._file = file

    def _stored(self, index: int) -> bytes:
        if self._file is None:
            self._open()
        file, self._file = self._file, None  # one that failed is not used again
        stored: bytes = file.read(index, index + 1)[0]
        self._file = file
        return stored


def _parsed(raw: bytes) -> Record:
    try:
        version, itemsize, count, starts, *_ = _HEADER.unpack_from(raw)
        if version != FORMAT or len(raw) != _HEADER.size + 4 * starts + itemsize * count:
            raise ValueError(f"format {version}, {len(raw)} bytes")
        begin = _HEADER.size + 4 * starts
        return Record(
            np.frombuffer(raw, "<u2" if itemsize == 2 else "<u4", count, begin),
            np.frombuffer(raw, "<u4", starts, _HEADER.size),
        )
    except (struct.error, ValueError) as error:
        raise Damage(f"is not of this format: {error}") from None
