"""Input files as they are stored: whole or in ranges, compressed or not."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import zstandard

from lm.data.remote import opened
from lm.errors import DataError

TokenFormat = Literal["uint16", "uint32", "llm.c", "megatron"]

_BLOCK = 1 << 18


class Hash(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class File:
    """An input file. `name` is what users see; it holds no more of the path than they wrote."""

    source: str
    name: str
    path: str
    size: int
    modified: int
    heldout: bool = False
    tokens: TokenFormat | None = None
    """What it holds in place of text."""


@dataclass(frozen=True)
class Piece:
    """A file or a range of its bytes. What begins in the range belongs to it: a line, a group of rows."""

    file: File
    start: int
    stop: int


class Document(NamedTuple):
    name: str
    text: str
    raw: bytes
    """`text` in UTF-8, or `tokens` as little-endian uint32: what stands for the document where it is hashed."""
    tokens: np.ndarray | None = None
    """int32 [n]; then `text` is empty."""


def whole(file: File) -> Piece:
    return Piece(file, 0, file.size)


def cut_at(file: File, offsets: Iterable[int], limit: int) -> list[Piece]:
    """The file in ranges of at least `limit` bytes that begin at some of the ascending `offsets`."""
    bounds = [0]
    for offset in offsets:
        if offset - bounds[-1] >= limit:
            bounds.append(offset)
    return between(file, bounds)


def between(file: File, bounds: list[int]) -> list[Piece]:
    """The file in ranges that begin at `bounds`."""
    return [Piece(file, *bound) for bound in zip(bounds, [*bounds[1:], file.size], strict=True)]


def stored_hash(piece: Piece) -> str:
    """sha256 of the bytes of the piece as stored."""
    digest = hashlib.sha256()
    for _ in stored_blocks(piece, digest):
        pass
    return digest.hexdigest()


def stored_blocks(piece: Piece, digest: Hash | None = None) -> Iterator[bytes]:
    """The bytes of the piece, which `digest` is given as they pass."""
    try:
        with opened(piece.file.path, piece.file.size) as stream:
            stream.seek(piece.start)
            left = piece.stop - piece.start
            while left and (block := stream.read(min(_BLOCK, left))):
                left -= len(block)
                if digest is not None:
                    digest.update(block)
                yield block
    except OSError as error:
        raise DataError(f"{piece.file.name}: cannot be read: {error.strerror or error}") from None
    if left:
        raise DataError(f"{piece.file.name}: became shorter while it was read")


def blocks(piece: Piece, digest: Hash | None) -> Iterator[bytes]:
    """The bytes of the piece, decompressed."""
    name = piece.file.name
    if not name.endswith((".gz", ".zst")):
        yield from stored_blocks(piece, digest)
        return
    gzip = name.endswith(".gz")
    decoder = None
    try:
        for block in stored_blocks(piece, digest):
            while block:
                if decoder is None:
                    decoder = zlib.decompressobj(31) if gzip else zstandard.ZstdDecompressor().decompressobj()
                yield decoder.decompress(block)
                # A file may hold several compressed streams, one after the other.
                block = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    except (zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{name}: broken compressed data: {error}") from None
    if decoder is not None or not piece.file.size:  # of nothing, both formats make a few bytes
        raise DataError(f"{name}: the compressed data ends too early; the file seems truncated")


def not_utf8(where: str, offset: int, byte: int) -> DataError:
    return DataError(
        f"{where}: not UTF-8: byte 0x{byte:02x} at offset {offset}; convert the file "
        "(for instance iconv -f latin1 -t utf-8) or leave it out of data.paths"
    )
