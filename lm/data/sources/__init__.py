"""From `data.paths` to documents: files in a fixed order, and the texts in each.

listing -> stored       the files, and pieces of them, so that several processes can read
selection               which records are documents, and what their text is
text, jsonl, parquet,   one file for each format: `cut` into pieces, and the `documents` of a piece
arrow, array_record     (`columns` has what is common to the two that pyarrow reads)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from lm.data.sources import array_record, arrow, jsonl, parquet, text, tokens
from lm.data.sources.listing import STDLIB, list_files, present
from lm.data.sources.selection import Filter, Selection, load_filter
from lm.data.sources.stored import Document, File, Hash, Piece, stored_hash, whole
from lm.data.sources.tokens import Ids
from lm.errors import DataError

__all__ = [
    "STDLIB",
    "Document",
    "File",
    "Filter",
    "Ids",
    "Piece",
    "content_hash",
    "cut",
    "documents",
    "list_files",
    "load_filter",
    "present",
    "whole",
]

_ARRAY_RECORD = re.compile(r"\.array_?record(-\d+-of-\d+)?$")


def cut(file: File, limit: int) -> list[Piece]:
    """The file in pieces of about `limit` bytes, as far as its format allows."""
    if file.size <= limit:
        return [whole(file)]
    match _format(file):
        case "tokens":
            return tokens.cut(file, limit)
        case "jsonl":
            return jsonl.cut(file, limit)
        case "parquet":
            return parquet.cut(file, limit)
        case "arrow":
            return arrow.cut(file, limit)
        case "array_record":
            return array_record.cut(file, limit)
        case _:
            return [whole(file)]


def documents(
    piece: Piece,
    text_field: str,
    skipped: Counter[str],
    digest: Hash | None = None,
    keep: Filter | None = None,
    ids: Ids | None = None,
) -> Iterator[Document]:
    """The documents of the piece. Counts in `skipped` what was left out: "empty", "filtered" or "not UTF-8".

    `digest` is given what `content_hash` is of; `ids` is needed where the file holds tokens.

    Raises:
        DataError: text that is not UTF-8 (but for the standard library's own tests of that), a broken
            file, a record that lacks the text, a filter that fails, an id that the tokenizer has not; each with its
            place.
    """
    if piece.file.tokens:
        if ids is None:
            raise DataError(f"{piece.file.name}: holds tokens, but text is needed here")
        yield from tokens.documents(piece, ids, skipped, digest)
        return
    selection = Selection(text_field, skipped, keep)
    match _format(piece.file):
        case "jsonl":
            yield from jsonl.documents(piece, selection, digest)
        case "parquet":
            yield from parquet.documents(piece, selection, digest)
        case "arrow":
            yield from arrow.documents(piece, selection, digest)
        case "array_record":
            yield from array_record.documents(piece, selection, digest)
        case _:
            yield from text.documents(piece, selection, digest)


def content_hash(piece: Piece) -> str:
    """sha256 of what is in the piece."""
    match _format(piece.file):
        case "array_record":
            return array_record.content_hash(piece)
        case "tokens":
            return tokens.content_hash(piece)
        case _:
            return stored_hash(piece)


def _format(file: File) -> str:
    if file.tokens:
        return "tokens"
    if file.name.endswith((".bin", ".idx")):  # small ids would even be valid UTF-8
        raise DataError(
            f"{file.name}: seems to hold tokens; set data.tokens to 'uint16' or 'uint32' (what nanoGPT writes), "
            "'llm.c' or 'megatron', or give a text another name"
        )
    if _ARRAY_RECORD.search(file.name):
        return "array_record"
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        return "jsonl"
    if file.name.endswith((".parquet", ".arrow")):
        return file.name.rpartition(".")[2]
    return "text"
