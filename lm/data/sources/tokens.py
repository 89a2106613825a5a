"""Files of tokens, as other trainers write them: `uint16` and `uint32` (nanoGPT), `llm.c` and `megatron`.

In the first three a document is what lies between two separators. In the last one, an index beside the file says where
documents begin. A piece holds the documents that begin in it, so cutting need not know where that is.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from lm.data.sources import megatron
from lm.data.sources.stored import Document, File, Hash, Piece, between, stored_blocks
from lm.errors import DataError

_LLM_C_HEADER = 256 * 4  # 256 int32: a mark of the kind, a version, the number of tokens, nothing
_LLM_C_KINDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # of GPT-2 and of Llama 3: version, type of tokens


@dataclass(frozen=True)
class Ids:
    """What the tokenizer, or the config, says of ids. `separators` are in no document of a file without an index."""

    bos: int
    eos: int
    vocab_size: int
    separators: tuple[int, ...]


def cut(file: File, limit: int) -> list[Piece]:
    limit = max(8, limit - limit % 8)  # no piece begins inside a token
    return between(file, list(range(0, file.size, limit)))


def documents(piece: Piece, ids: Ids, skipped: Counter[str], digest: Hash | None) -> Iterator[Document]:
    """Begin and end of document, which the build puts around each, are taken off where they are there already."""
    name = piece.file.name
    _starts_in_hash(piece, digest)
    for start, tokens in _parts(piece, ids, _layout(piece.file, ids), digest):
        inner = tokens[int(tokens[0] == ids.bos) :].astype(np.int32)
        inner = inner[:-1] if len(inner) and inner[-1] == ids.eos else inner
        if len(inner):
            yield Document(f"{name}: token {start}", "", inner.astype("<u4").tobytes(), inner)
        else:
            skipped["empty"] += 1


def content_hash(piece: Piece) -> str:
    """sha256 of the bytes of the piece as stored; where there is an index, after what it says of them."""
    digest = hashlib.sha256()
    _starts_in_hash(piece, digest)
    for _ in stored_blocks(piece, digest):
        pass
    return digest.hexdigest()


def _starts_in_hash(piece: Piece, digest: Hash | None) -> None:
    if piece.file.tokens == "megatron" and digest is not None:
        digest.update(megatron.read_index(piece.file).starts(piece.start, piece.stop).astype("<i8").tobytes())


@dataclass(frozen=True)
class _Layout:
    header: int
    dtype: np.dtype
    cuts: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
    """Of an array of tokens and the index in the file of its first: ascending, where in it a document ends, and where
    the next may begin."""


def _layout(file: File, ids: Ids) -> _Layout:
    if file.tokens == "megatron":
        index = megatron.read_index(file)
        return _Layout(0, index.dtype, index.cuts)
    mark, version, count = np.frombuffer(_head(file, 12).ljust(12, b"\0"), "<i4").tolist()
    if file.tokens == "llm.c":
        if mark not in _LLM_C_KINDS or version != _LLM_C_KINDS[mark][0]:
            raise DataError(
                f"{file.name}: not a file of tokens of llm.c: begins with {mark}, {version}, not with 20240520, 1 or "
                "20240801, 7; of nanoGPT, data.tokens is 'uint16' or 'uint32'"
            )
        header, dtype = _LLM_C_HEADER, np.dtype(_LLM_C_KINDS[mark][1])
    elif mark in _LLM_C_KINDS:
        raise DataError(f"{file.name}: begins as files of llm.c do; set data.tokens to 'llm.c'")
    else:
        header, dtype = 0, np.dtype(file.tokens).newbyteorder("<")
    size = file.size - header
    if size % dtype.itemsize:
        raise DataError(
            f"{file.name}: {size} bytes are no whole number of {dtype.name} tokens; truncated, or not a file of them"
        )
    if header and size != count * dtype.itemsize:
        raise DataError(f"{file.name}: holds {size // dtype.itemsize} tokens, but should hold {count}; truncated?")
    return _Layout(header, dtype, functools.partial(_separated, ids.separators))


def _head(file: File, size: int) -> bytes:
    return b"".join(stored_blocks(Piece(file, 0, min(size, file.size))))


def _separated(separators: tuple[int, ...], tokens: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
    found = np.zeros(len(tokens), bool)
    for separator in separators:
        found |= tokens == separator
    ends = np.flatnonzero(found)
    return ends, ends + 1


def _parts(piece: Piece, ids: Ids, layout: _Layout, digest: Hash | None) -> Iterator[tuple[int, np.ndarray]]:
    """(index of the first token, tokens) of each document that begins in the piece; none is empty."""
    size = layout.dtype.itemsize
    position, stop = ((max(layout.header, at) - layout.header) // size for at in (piece.start, piece.stop))
    inside = True  # whether what comes belongs to a document of this piece
    if position:
        before = b"".join(stored_blocks(Piece(piece.file, piece.start - size, piece.start)))
        inside = len(layout.cuts(np.frombuffer(before, layout.dtype), position - 1)[0]) > 0
    begin = position
    collected: list[np.ndarray] = []
    for tokens in _arrays(piece, layout, digest):
        _check(piece.file, position, tokens, ids)
        done = 0
        for end, following in zip(*(where.tolist() for where in layout.cuts(tokens, position)), strict=True):
            collected.append(tokens[done:end])
            if inside and position + end > begin:
                yield begin, np.concatenate(collected)
            inside, collected, done, begin = True, [], following, position + following
            if begin >= stop:
                return
        position += len(tokens)
        if inside:
            collected.append(tokens[done:])
        elif position >= stop:
            return
    if inside and position > begin:
        yield begin, np.concatenate(collected)


def _arrays(piece: Piece, layout: _Layout, digest: Hash | None) -> Iterator[np.ndarray]:
    """The tokens from the first of the piece on, to the end of the file."""
    after = Piece(piece.file, piece.stop, piece.file.size)
    skip, rest = max(0, layout.header - piece.start), b""
    for block in itertools.chain(stored_blocks(piece, digest), stored_blocks(after)):
        raw, skip = rest + block[skip:], max(0, skip - len(block))
        whole = len(raw) - len(raw) % layout.dtype.itemsize
        rest = raw[whole:]
        yield np.frombuffer(raw[:whole], layout.dtype)


def _check(file: File, position: int, tokens: np.ndarray, ids: Ids) -> None:
    wrong = tokens >= ids.vocab_size
    if tokens.dtype.kind == "i":
        wrong |= tokens < 0
    for index in np.flatnonzero(wrong).tolist():
        if tokens[index] not in ids.separators:
            raise DataError(
                f"{file.name}: token {position + index} is {tokens[index]}, but the tokenizer has ids below "
                f"{ids.vocab_size}; the tokens are of another one, or not {tokens.dtype.name}"
            )
