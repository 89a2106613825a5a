"""A record of an ArrayRecord file is a document: text, or a JSON object if it begins with a brace.

Where in the file a record lies is not known. So a piece of n bytes of N stands for the records from i n / N on:
each record belongs to one piece, whatever its size.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from array_record.python import array_record_module

from lm.data.files import local_copy
from lm.data.sources.jsonl import parse
from lm.data.sources.selection import Selection
from lm.data.sources.stored import Document, File, Hash, Piece, between, not_utf8
from lm.errors import DataError

_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # no threads: the build has its processes


def cut(file: File, limit: int) -> list[Piece]:
    return between(file, list(range(0, file.size, limit)))


def documents(piece: Piece, selection: Selection, digest: Hash | None) -> Iterator[Document]:
    for number, raw in _records(piece, digest):
        where = f"{piece.file.name}: record {number}"
        try:
            text = selection.text(parse(raw)) if raw.startswith(b"{") else selection.plain(raw.decode())
        except UnicodeDecodeError as error:
            raise not_utf8(where, error.start, raw[error.start]) from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {error}") from None
        if text:
            yield Document(where, text, text.encode())


def content_hash(piece: Piece) -> str:
    """sha256 of the records of the piece, each after its length: the bytes of the file may belong to others."""
    digest = hashlib.sha256()
    for _ in _records(piece, digest):
        pass
    return digest.hexdigest()


def _records(piece: Piece, digest: Hash | None) -> Iterator[tuple[int, bytes]]:
    with _opened(piece.file) as reader:
        count, size = reader.num_records(), piece.file.size
        first, last = count * piece.start // size, count * piece.stop // size
        if first < last:
            reader.seek(first)
        for number in range(first, last):
            raw = reader.read()
            if digest is not None:
                digest.update(len(raw).to_bytes(8, "big"))
                digest.update(raw)
            yield number, raw


@contextlib.contextmanager
def _opened(file: File) -> Iterator[Any]:
    try:
        path = local_copy(file.path, file.size, str(file.modified))
        reader = array_record_module.ArrayRecordReader(path, _READ_OPTIONS)
        try:
            yield reader
        finally:
            reader.close()  # raises if the file is broken as a whole, which up to here looks as if it were empty
    except (RuntimeError, OSError) as error:
        raise DataError(f"{file.name}: broken ArrayRecord file, or none: {error}") from None
