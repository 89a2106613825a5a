"""Which text is trained on and which is held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lm.data import sources
from lm.data.config import DataConfig
from lm.data.sources import Document, Ids, Piece
from lm.data.tokenizers import Tokenizer, load_tokenizer
from lm.errors import DataError

CHECKSUMS = 2**256


@dataclass
class Tally:
    """What was read: documents by source, what was left out, and the hash of each piece."""

    counts: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    hashes: list[str] = dataclasses.field(default_factory=list)
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)
    """By source the sum of the sha256 of all its documents: however they are divided, of the same text the same."""
    done: int = 0
    piece: int = 0
    hashed: int = 0
    text: int = 0

    @property
    def bytes_read(self) -> int:
        """Of the pieces as they are stored, up to now; where that is not known inside a piece, about."""
        return self.done + min(self.piece, self.hashed or self.text)


class _PieceHash:
    """sha256 of a piece, for the tally."""

    def __init__(self, tally: Tally, piece: Piece) -> None:
        self._digest = hashlib.sha256()
        self._tally = tally
        tally.piece, tally.hashed, tally.text = piece.stop - piece.start, 0, 0

    def update(self, data: bytes, /) -> None:
        self._digest.update(data)
        self._tally.hashed += len(data)

    def close(self) -> None:
        self._tally.hashes.append(self._digest.hexdigest())
        self._tally.done += self._tally.piece
        self._tally.piece = 0


class Found(NamedTuple):
    """A document as a review sees it."""

    number: int
    """In the part, counted from 0."""
    piece: Piece
    document: Document
    sha256: bytes
    """Of `document.raw`."""
    ends: list[tuple[str, Any, int]]
    """(split, text, bytes of text)."""


Review = Callable[[Found], str | None]
"""Gives the reason for which a document is left out, None if it is not."""


def split_pieces(
    pieces: Iterable[Piece],
    config: DataConfig,
    below: int,
    tally: Tally,
    review: Review | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[tuple[str, str, Any, int]]:
    """(split, source, text, bytes of text) of every document, or of both ends of it.

    Where `data.tokens` is set, `tokenizer` is needed, and in place of text come int32 [n] tokens without begin and end.
    """
    index = 0
    ids = _ids(config, tokenizer)
    keep = sources.load_filter(config.filter)
    for piece in pieces:
        source = piece.file.source
        count = tally.counts.setdefault(source, Counter())
        skipped = tally.skipped.setdefault(source, Counter())
        digest = _PieceHash(tally, piece)
        for document in sources.documents(piece, config.text_field, skipped, digest, keep, ids):
            tally.text += len(document.raw)
            sha256 = hashlib.sha256(document.raw).digest()
            tally.checksums[source] = (tally.checksums.get(source, 0) + int.from_bytes(sha256, "big")) % CHECKSUMS
            found = Found(index, piece, document, sha256, _split(document, piece, config, below, sha256, tokenizer))
            index += 1
            if review is not None and (reason := review(found)) is not None:
                skipped[reason] += 1
                continue
            count["documents"] += 1
            for split, text, size in found.ends:
                count["heldout_documents"] += split == "heldout"
                yield split, source, text, size
        digest.close()


def text_hash(raw: bytes) -> int:
    return hash_number(hashlib.sha256(raw).digest())


def hash_number(sha256: bytes) -> int:
    """What documents are held out by."""
    return int.from_bytes(sha256[:8], "big")


def holdout_below(config: DataConfig, parts: list[list[Piece]]) -> int:
    """The hash below which documents are held out; at least one is, however few there are."""
    if config.holdout_paths or config.holdout_by == "tail" or config.holdout_fraction == 0:
        return 0
    wanted = int(config.holdout_fraction * 2**64)
    smallest, largest = 2**64, -1
    keep = sources.load_filter(config.filter)
    kind, path = config.tokenizer.kind, config.tokenizer.path
    ids = _ids(config, load_tokenizer(kind, path or b"") if config.tokens else None)
    for part in parts:
        for piece in part:
            for document in sources.documents(piece, config.text_field, Counter(), keep=keep, ids=ids):
                value = text_hash(document.raw)
                if value < wanted:
                    return wanted
                smallest, largest = min(smallest, value), max(largest, value)
    if largest < 0:
        raise DataError(f"data.paths: no document with text in {', '.join(config.paths)}")
    if smallest == largest:
        raise DataError(
            "data.holdout_fraction: there is only one document, so none can be held out; set "
            "data.holdout_by to 'tail' to hold out its end, or name other files in data.holdout_paths"
        )
    return smallest + 1


def _split(
    document: Document,
    piece: Piece,
    config: DataConfig,
    below: int,
    sha256: bytes,
    tokenizer: Tokenizer | None,
) -> list[tuple[str, Any, int]]:
    if document.tokens is not None and tokenizer is not None:
        return _split_tokens(document.tokens, piece, config, below, sha256, tokenizer)
    size = len(document.raw)
    if config.holdout_paths:
        return [("heldout" if piece.file.heldout else "train", document.text, size)]
    if config.holdout_by == "document":
        heldout = hash_number(sha256) < below
        return [("heldout" if heldout else "train", document.text, size)]
    middle = int((1 - config.holdout_fraction) * size)
    while middle < size and document.raw[middle] & 0xC0 == 0x80:  # inside a character
        middle -= 1
    ends = [("train", document.raw[:middle]), ("heldout", document.raw[middle:])]
    return [(split, raw.decode(), len(raw)) for split, raw in ends if raw]


def _split_tokens(
    tokens: np.ndarray, piece: Piece, config: DataConfig, below: int, sha256: bytes, tokenizer: Tokenizer
) -> list[tuple[str, np.ndarray, int]]:
    if config.holdout_paths:
        ends = [("heldout" if piece.file.heldout else "train", tokens)]
    elif config.holdout_by == "document":
        ends = [("heldout" if hash_number(sha256) < below else "train", tokens)]
    else:
        middle = int((1 - config.holdout_fraction) * len(tokens))
        ends = [("train", tokens[:middle]), ("heldout", tokens[middle:])]
    return [(split, part, int(tokenizer.token_bytes[part].sum())) for split, part in ends if len(part)]


def _ids(config: DataConfig, tokenizer: Tokenizer | None) -> Ids | None:
    if not config.tokens or tokenizer is None:
        return None
    begin, end = tokenizer.bos_id, tokenizer.eos_id
    separators = (begin, end) if config.separator is None else (config.separator,)
    return Ids(begin, end, tokenizer.vocab_size, separators)
