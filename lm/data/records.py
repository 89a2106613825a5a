"""The format of the built files: the documents of a shard as one stream of tokens, cut into records.

A document is its begin token, its text's tokens and its end token. The stream is cut every
RECORD_TOKENS tokens whatever the documents' lengths, so that position p of the stream is found in
record p // RECORD_TOKENS without an index, and documents may be of any length.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from array_record.python import array_record_module
from etils import epath

from lm.data import files
from lm.errors import DataError, StorageError

FORMAT = 1
RECORD_TOKENS = 8192

# format, bytes per token, tokens, starts, index in the shard of the document that the first token
# belongs to, position of the first token in that document; then starts (uint32), then tokens.
_HEADER = struct.Struct("<HHIIIQQ")

# One record per chunk, not compressed: a random read touches nothing else.
_WRITE_OPTIONS = "group_size:1,uncompressed"
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


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
    first_document: int
    first_offset: int


class ShardWriter:
    """Writes one shard; the file appears under its name when `close` is called."""

    def __init__(self, path: epath.Path, dtype: np.dtype) -> None:
        self._path = path
        self._temporary = files.temporary_for(path)
        self._file = array_record_module.ArrayRecordWriter(str(self._temporary), _WRITE_OPTIONS)
        self._tokens = np.zeros(RECORD_TOKENS, dtype.newbyteorder("<"))
        self._filled = 0
        self._starts: list[int] = []
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
            files.publish(self._temporary, self._path)
        except (RuntimeError, OSError) as error:
            raise StorageError(f"{self._path}: cannot be written: {error}") from None
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
            raise StorageError(f"{self._path}: cannot be written: {error}") from None
        self._totals["records"] += 1
        self._filled = 0
        self._starts = []


class ShardReader:
    """Random access to the records of one shard."""

    def __init__(self, path: epath.Path, shard: Shard) -> None:
        """Raises DataError if the file cannot be opened."""
        self._name = str(path)
        try:
            local = files.local_copy(path, shard.size, shard.sha256)
            self._file = array_record_module.ArrayRecordReader(local, _READ_OPTIONS)
            count = self._file.num_records()
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: cannot be opened: {error}") from None
        if count != shard.records:  # also when there is no file: the library then finds none
            raise DataError(
                f"{path}: missing or damaged ({count} records instead of {shard.records}); build the data again"
            )

    def read(self, index: int) -> Record:
        """Raises DataError naming shard and record if it does not hold what was written."""
        raw = self.raw(index)
        try:
            version, itemsize, count, starts, _, document, offset = _HEADER.unpack_from(raw)
            if version != FORMAT or len(raw) != _HEADER.size + 4 * starts + itemsize * count:
                raise ValueError(f"format {version}, {len(raw)} bytes")
            begin = _HEADER.size + 4 * starts
            return Record(
                np.frombuffer(raw, "<u2" if itemsize == 2 else "<u4", count, begin),
                np.frombuffer(raw, "<u4", starts, _HEADER.size),
                document,
                offset,
            )
        except (struct.error, ValueError) as error:
            raise DataError(f"{self._name}: record {index} is not of this format: {error}") from None

    def raw(self, index: int) -> bytes:
        """The record's content as stored."""
        try:
            return self._file.read(index, index + 1)[0]
        except (RuntimeError, OSError, IndexError) as error:
            raise DataError(f"{self._name}: record {index} cannot be read: {error}") from None
