"""The index of a file of tokens that Megatron-LM's preprocessing wrote: x.idx beside x.bin.

A mark, a version, a code of the type of tokens, then of each sequence its length and the byte where it begins, then the
numbers of the sequences that begin documents, and last how many sequences there are.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from dataclasses import dataclass

import numpy as np

from lm.data import remote
from lm.data.files import local_copy
from lm.data.sources.stored import File
from lm.errors import DataError
from lm.files import is_url

_MARK = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")  # mark, version, type of tokens, sequences, documents + 1
_BLOCK = 1 << 20  # documents that are looked at together
_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class Index:
    """What an index says; it may be of a billion documents, so all of it stays in its file."""

    path: str
    dtype: np.dtype
    lengths: np.ndarray
    """int32 [sequences], in tokens."""
    pointers: np.ndarray
    """int64 [sequences], in bytes."""
    documents: np.ndarray
    """int64 [documents + 1]: the sequences that begin them, and how many sequences there are."""

    def starts(self, start: int, stop: int) -> np.ndarray:
        """int64: the tokens where documents begin, from byte `start` to before byte `stop`."""
        size = self.dtype.itemsize
        return self._between(-(-start // size), -(-stop // size))

    def cuts(self, tokens: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Where in the tokens, of which the first is at `position`, one document ends and the next begins."""
        cuts = self._between(position + 1, position + len(tokens) + 1) - position
        return cuts, cuts

    def _between(self, start: int, stop: int) -> np.ndarray:
        """Those of the tokens `start` to before `stop` that begin a document which is not the last."""
        size = self.dtype.itemsize
        first, last = np.searchsorted(self.pointers, [start * size, stop * size])
        begun, ended = np.searchsorted(self.documents[:-1], [first, last])
        self._check(first, last)
        return self.pointers[self.documents[begun:ended]] // size

    def _check(self, first: int, last: int) -> None:
        """That the sequences lie one after the other: it is by this that the tokens between two begins are one."""
        pointers = self.pointers[max(0, first - 1) : last]
        lengths = self.lengths[max(0, first - 1) : last]
        if (pointers[1:] != pointers[:-1] + lengths[:-1].astype(np.int64) * self.dtype.itemsize).any():
            raise DataError(f"{self.path}: the sequences do not lie one after the other")


def read_index(file: File) -> Index:
    """The index of a .bin file.

    Raises:
        DataError: there is none, or it is not of this file.
    """
    path = f"{file.path.removesuffix('.bin')}.idx"
    there = _stat(path)
    if there is None or not file.path.endswith(".bin"):
        raise DataError(f"{file.name}: has no index {path}; name the .bin file of a pair of .bin and .idx")
    return _read(path, *there, file.size)


def _stat(path: str) -> tuple[int, int] | None:
    """Size and time of change."""
    if is_url(path):
        there = remote.entry(path)
        return None if there is None else (there.size, there.modified)
    try:
        local = os.stat(path)
    except OSError:
        return None
    return local.st_size, local.st_mtime_ns


@functools.lru_cache(maxsize=4)
def _read(path: str, size: int, modified: int, tokens_size: int) -> Index:
    with open(local_copy(path, size, str(modified)), "rb") as stream:
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    if len(content) < _HEADER.size or content[: len(_MARK)] != _MARK:
        raise DataError(f"{path}: not an index of Megatron-LM: it does not begin with {_MARK.decode()!r}")
    _, version, code, sequences, documents = _HEADER.unpack_from(content)
    if version != 1 or code not in _TYPES:
        types = ", ".join(f"{known} ({np.dtype(name).name})" for known, name in _TYPES.items())
        raise DataError(f"{path}: version {version}, type of tokens {code}; read are version 1 and the types {types}")
    if size < _HEADER.size + 12 * sequences + 8 * documents:
        raise DataError(f"{path}: {size} bytes are too few for {sequences} sequences; truncated?")
    dtype = np.dtype(_TYPES[code])
    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, _HEADER.size + lengths.nbytes)
    first = np.frombuffer(content, "<i8", documents, _HEADER.size + lengths.nbytes + pointers.nbytes)
    end = int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize if sequences else 0
    if end != tokens_size:
        raise DataError(f"{path}: is of a .bin file of {end} bytes, but that has {tokens_size}; truncated?")
    if documents < 1 or first[0] != 0 or first[-1] != sequences:
        raise DataError(f"{path}: the documents are not made of all sequences")
    for block in (first[start : start + _BLOCK + 1] for start in range(0, documents, _BLOCK)):
        if (block[1:] < block[:-1]).any():  # looking for one of them would miss others
            raise DataError(f"{path}: the documents do not follow each other")
    return Index(path, dtype, lengths, pointers, first)
