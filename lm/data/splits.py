"""Which text is trained on and which is held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lm.data import sources
from lm.data.config import DataConfig
from lm.data.sources import Document, Piece
from lm.errors import DataError


@dataclass
class Tally:
    """What was read: documents by source, what was left out, and the hash of each piece."""

    counts: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    hashes: list[str] = dataclasses.field(default_factory=list)


def split_pieces(
    pieces: Iterable[Piece], config: DataConfig, below: int, tally: Tally
) -> Iterator[tuple[str, str, str, int]]:
    """(split, source, text, bytes of text) of every document, or of both ends of it."""
    keep = sources.load_filter(config.filter)
    for piece in pieces:
        source = piece.file.source
        count = tally.counts.setdefault(source, Counter())
        skipped = tally.skipped.setdefault(source, Counter())
        digest = hashlib.sha256()
        for document in sources.documents(piece, config.text_field, skipped, digest, keep):
            count["documents"] += 1
            for split, text, size in _split(document, piece, config, below):
                count["heldout_documents"] += split == "heldout"
                yield split, source, text, size
        tally.hashes.append(digest.hexdigest())


def text_hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")


def holdout_below(config: DataConfig, parts: list[list[Piece]]) -> int:
    """The hash below which documents are held out; at least one is, however few there are."""
    if config.holdout_paths or config.holdout_by == "tail" or config.holdout_fraction == 0:
        return 0
    wanted = int(config.holdout_fraction * 2**64)
    smallest, largest = 2**64, -1
    keep = sources.load_filter(config.filter)
    for part in parts:
        for piece in part:
            for document in sources.documents(piece, config.text_field, Counter(), keep=keep):
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


def _split(document: Document, piece: Piece, config: DataConfig, below: int) -> list[tuple[str, str, int]]:
    size = len(document.raw)
    if config.holdout_paths:
        return [("heldout" if piece.file.heldout else "train", document.text, size)]
    if config.holdout_by == "document":
        heldout = text_hash(document.raw) < below
        return [("heldout" if heldout else "train", document.text, size)]
    middle = int((1 - config.holdout_fraction) * size)
    while middle < size and document.raw[middle] & 0xC0 == 0x80:  # inside a character
        middle -= 1
    ends = [("train", document.raw[:middle]), ("heldout", document.raw[middle:])]
    return [(split, raw.decode(), len(raw)) for split, raw in ends if raw]
