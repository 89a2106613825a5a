"""Which tokens of a source each of its rows holds: a shuffle for each epoch, in closed form."""

from __future__ import annotations

import abc
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.packing import best_fit
from lm.data.permutation import Permutation
from lm.data.stream import TokenStream

_BLOCK = 256  # windows whose places are computed at once: numpy is slow on few
_GROUP = 64  # rows that documents are fitted into together
_GROUPS = 128  # groups whose rows are shuffled among each other


class Spans(NamedTuple):
    """Stretches of a stream, by the row that holds them and from left to right in it. All int64 [n]."""

    row: np.ndarray
    start: np.ndarray
    length: np.ndarray


class Order(abc.ABC):
    """The stream of N tokens is taken as a circle. Epoch e cuts it, from an offset drawn for that epoch, into
    W = ceil(N / S) rows of S tokens, the last of which may be shorter, and shuffles them."""

    def __init__(self, stream: TokenStream, length: int, key: str) -> None:
        self.stream, self.length, self._key = stream, length, key
        self.rows_per_epoch = -(-stream.tokens // length)
        self._block = functools.lru_cache(maxsize=8)(self._draw_block)

    @abc.abstractmethod
    def spans(self, index: Sequence[int] | np.ndarray) -> Spans:
        """Of rows number `index`, counted through all epochs; `row` counts them as they are given."""

    @abc.abstractmethod
    def row_with(self, epoch: int, position: int) -> int:
        """The row of an epoch in which the token at `position` of the stream is."""

    @abc.abstractmethod
    def _draw_block(self, epoch: int, block: int) -> list[Any]:
        """Some rows of an epoch in the order in which they are read."""

    def offset(self, epoch: int) -> int:
        """Where the epoch begins in the stream."""
        drawn = hashlib.sha256(f"offset/{self._key}/{epoch}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") % self.length

    def _permutation(self, epoch: int, size: int, of: str = "order") -> Permutation:
        return Permutation(size, f"{of}/{self._key}/{epoch}")


class Split(Order):
    """Every S tokens are a row."""

    def spans(self, index: Sequence[int] | np.ndarray) -> Spans:
        found = []  # one by one: most often there are few, and numpy is slow on few
        for one in index:
            epoch, row = divmod(int(one), self.rows_per_epoch)
            block, place = divmod(row, _BLOCK)
            found.append(self._block(epoch, block)[place])
        return Spans(np.arange(len(found)), *np.array(found, np.int64).reshape(-1, 2).T)

    def row_with(self, epoch: int, position: int) -> int:
        begin = (position - self.offset(epoch)) % self.stream.tokens
        return self._permutation(epoch, self.rows_per_epoch).inverse(begin // self.length)

    def _draw_block(self, epoch: int, block: int) -> list[list[int]]:
        """Start and length of each."""
        size, tokens = self.rows_per_epoch, self.stream.tokens
        order = self._permutation(epoch, size)
        begin = order(np.arange(block * _BLOCK, min((block + 1) * _BLOCK, size))) * self.length
        return np.stack([(self.offset(epoch) + begin) % tokens, np.minimum(self.length, tokens - begin)], 1).tolist()


class BestFit(Order):
    """Every 64 S tokens, with what begins and ends in them, fill 64 rows.

    Groups of 64 rows are shuffled, and then the rows of each 128 groups that follow each other: a row can be made of
    what is known of one group, and neighbours in a batch come from all over the stream.
    """

    def __init__(self, stream: TokenStream, length: int, key: str) -> None:
        super().__init__(stream, length, key)
        self._groups = self.rows_per_epoch // _GROUP
        """The last rows, too few for a group, are read last."""
        self._fit = functools.lru_cache(maxsize=2 * _GROUPS)(self._fit_group)

    def spans(self, index: Sequence[int] | np.ndarray) -> Spans:
        found: list[tuple[int, int, int]] = []
        for number, one in enumerate(index):
            epoch, row = divmod(int(one), self.rows_per_epoch)
            block, place = divmod(row, _GROUP * _GROUPS)
            group, inside = divmod(self._block(epoch, block)[place], _GROUP)
            found += [(number, start, length) for start, length in self._fit(epoch, group)[inside]]
        return Spans(*np.array(found, np.int64).reshape(-1, 3).T)

    def row_with(self, epoch: int, position: int) -> int:
        begin = (position - self.offset(epoch)) % self.stream.tokens
        group = begin // (self.length * _GROUP)
        inside = next(
            row
            for row, spans in enumerate(self._fit(epoch, group))
            if any(start <= position < start + length for start, length in spans)
        )
        wanted = group * _GROUP + inside
        if group == self._groups:
            return wanted
        block = self._permutation(epoch, self._groups, "groups").inverse(group) // _GROUPS
        return block * _GROUP * _GROUPS + self._block(epoch, block).index(wanted)

    def _draw_block(self, epoch: int, block: int) -> list[int]:
        """Rows, as group * 64 + row in it."""
        full = self._groups * _GROUP
        first = block * _GROUP * _GROUPS
        groups = np.arange(block * _GROUPS, min((block + 1) * _GROUPS, self._groups))
        rows = np.zeros(0, np.int64)
        if len(groups):
            chosen = self._permutation(epoch, self._groups, "groups")(groups)
            rows = (chosen[:, None] * _GROUP + np.arange(_GROUP)).reshape(-1)
            rows = rows[self._permutation(epoch, len(rows), f"rows/{block}")(np.arange(len(rows)))]
        tail = np.arange(max(full, first + len(rows)), min(self.rows_per_epoch, first + _GROUP * _GROUPS))
        return [*rows.tolist(), *tail.tolist()]

    def _fit_group(self, epoch: int, group: int) -> list[list[tuple[int, int]]]:
        """The spans of each row of the group."""
        done = group * _GROUP * self.length
        tokens = min(self.stream.tokens - done, _GROUP * self.length)
        begin = (self.offset(epoch) + done) % self.stream.tokens
        starts, lengths = [], []
        for first, last in self._parts(begin, tokens):
            found = self.stream.document_starts(first + 1, last)
            starts.append(np.concatenate([[first], found]))
            lengths.append(np.diff(np.concatenate([starts[-1], [last]])))
        start, rows = np.concatenate(starts), -(-tokens // self.length)
        cut = np.zeros(len(start), bool)
        cut[[0, -1]] = True  # where the group begins and ends, hardly ever with a document
        spans: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        for row, piece, offset, length in best_fit(np.concatenate(lengths), cut, rows, self.length):
            spans[row].append((int(start[piece]) + offset, length))
        return [sorted(row) for row in spans]

    def _parts(self, begin: int, tokens: int) -> list[tuple[int, int]]:
        """From where to where in the stream, whose end may be among them."""
        end = self.stream.tokens
        if begin + tokens <= end:
            return [(begin, begin + tokens)]
        return [(begin, end), (0, begin + tokens - end)]


ORDERS: dict[str, type[Order]] = {"split": Split, "best_fit": BestFit}
