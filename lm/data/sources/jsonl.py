"""A line of a .jsonl file is a document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from lm.data.remote import opened
from lm.data.sources.selection import Selection
from lm.data.sources.stored import Document, File, Hash, Piece, between, blocks, not_utf8, stored_blocks, whole
from lm.errors import DataError


def cut(file: File, limit: int) -> list[Piece]:
    """In ranges of about `limit` bytes that begin and end at a line; whole if compressed."""
    if not file.name.endswith(".jsonl"):
        return [whole(file)]
    bounds, end = [0], 0
    with opened(file.path, file.size, block=1 << 16) as stream:
        for position in range(limit, file.size, limit):
            if position < end:  # inside of a long line, which is not read again for each of these
                continue
            stream.seek(position)
            stream.readline()
            end = stream.tell()
            if end < file.size:
                bounds.append(end)
    return between(file, bounds)


def documents(piece: Piece, selection: Selection, digest: Hash | None) -> Iterator[Document]:
    name = piece.file.name
    for number, line in enumerate(_lines(blocks(piece, digest))):
        try:
            if not line.strip():
                continue
            text = selection.text(parse(line))
        except (ValueError, RecursionError) as error:
            where = f"{name}:{number + 1 + _lines_before(piece)}"
            if isinstance(error, UnicodeDecodeError):
                raise not_utf8(where, error.start, line[error.start]) from None
            raise DataError(f"{where}: {error}") from None
        if text:
            yield Document(f"{name}:{number + 1}", text, text.encode())


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object. Raises ValueError if it is none."""
    try:
        record = json.loads(raw.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got a {type(record).__name__}")
    return record


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        head, *tail = block.split(b"\n")
        rest.append(head)
        if tail:
            yield b"".join(rest)
            yield from tail[:-1]
            rest = [tail[-1]]
    yield b"".join(rest)


def _lines_before(piece: Piece) -> int:
    return sum(block.count(b"\n") for block in stored_blocks(Piece(piece.file, 0, piece.start)))
