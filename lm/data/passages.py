"""Which documents a stretch of a stream holds."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from lm.data.stream import TokenStream


class Passage(NamedTuple):
    """What a stretch holds of one document."""

    position: int
    """In the stream, of its first token."""
    offset: int
    """In the stretch."""
    tokens: int
    begins: bool
    """Whether the document begins here, and not before the stretch."""
    ends: bool


def passages(stream: TokenStream, start: int, length: int) -> list[Passage]:
    """Of the stretch of `length` tokens from `start`; the end of the stream is followed by its beginning."""
    size, stop = stream.tokens, start + length + 1  # whether the last document ends, the token after it tells
    firsts = [first - start for first in stream.document_starts(start, min(stop, size)).tolist()]
    if stop > size:
        firsts += [first + size - start for first in stream.document_starts(0, stop - size).tolist()]
    known = {*firsts}
    edges = [0, *(first for first in firsts if 0 < first < length), length]
    return [
        Passage((start + first) % size, first, last - first, first in known, last in known)
        for first, last in itertools.pairwise(edges)
    ]
