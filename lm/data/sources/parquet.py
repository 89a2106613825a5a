"""A row of a Parquet file is a document; a piece is the row groups that begin in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from lm.data.remote import opened
from lm.data.sources import columns
from lm.data.sources.selection import Selection
from lm.data.sources.stored import Document, File, Hash, Piece, cut_at, stored_blocks
from lm.files import is_url

_ROWS = 1024  # decoded at once


def cut(file: File, limit: int) -> list[Piece]:
    with _opened(file) as table:
        return cut_at(file, _starts(table.metadata), limit)


def documents(piece: Piece, selection: Selection, digest: Hash | None) -> Iterator[Document]:
    with _opened(piece.file) as table:
        yield from columns.documents(
            piece.file.name, table.schema_arrow.names, _batches(table, piece, selection), selection
        )
    if digest is not None:
        for _ in stored_blocks(piece, digest):
            pass


@contextlib.contextmanager
def _opened(file: File) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile."""
    parquet = columns.pyarrow("parquet", file.name)
    with columns.reading(file.name, "Parquet file"), contextlib.ExitStack() as stack:
        # In blocks that are small, since what is read of a column is asked for at once anyway.
        remote = is_url(file.path)
        source = stack.enter_context(opened(file.path, file.size, block=1 << 16)) if remote else file.path
        yield stack.enter_context(parquet.ParquetFile(source, memory_map=True, page_checksum_verification=True))


def _starts(metadata: Any) -> list[int]:
    """The offset of the first byte of each row group."""
    starts = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        starts.append(min((chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks), default=0))
    return starts


def _batches(table: Any, piece: Piece, selection: Selection) -> Iterator[tuple[int, Any]]:
    row = 0
    wanted = None if selection.keep else [selection.text_field]
    for index, start in enumerate(_starts(table.metadata)):
        first, row = row, row + table.metadata.row_group(index).num_rows
        if piece.start <= start < piece.stop:
            for batch in table.iter_batches(_ROWS, row_groups=[index], columns=wanted, use_threads=False):
                yield first, batch
                first += batch.num_rows
