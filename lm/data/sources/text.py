"""A text file is one document."""

from __future__ import annotations

from collections.abc import Iterator

from lm.data.sources.listing import STDLIB
from lm.data.sources.selection import Selection
from lm.data.sources.stored import Document, Hash, Piece, blocks, not_utf8
from lm.errors import DataError


def documents(piece: Piece, selection: Selection, digest: Hash | None) -> Iterator[Document]:
    raw = b"".join(blocks(piece, digest))
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        if piece.file.source != STDLIB:
            raise not_utf8(piece.file.name, error.start, raw[error.start]) from None
        selection.skipped["not UTF-8"] += 1
        return
    try:
        kept = selection.plain(text)
    except ValueError as error:
        raise DataError(f"{piece.file.name}: {error}") from None
    if kept:
        yield Document(piece.file.name, kept, raw)
