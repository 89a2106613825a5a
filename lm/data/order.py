"""Which tokens of a source each of its rows holds: a shuffle for each epoch, in closed form."""

from __future__ import annotations

import abc
import collections
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.packing import best_fit
from lm.data.permutation import Permutation, permute
from lm.data.stream import TokenStream

_GROUP = 16  # rows that documents are fitted into together
_GROUPS = 256  # groups whose rows are shuffled among each other
_AT_ONCE = 512  # groups that are fitted at once
_SPANS_KEPT = 1 << 21  # of groups that were fitted, by all orders that share them: some 60 MB


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
        # Of a run's epoch and the next, and for each of the blocks that are under way.
        self.offset = functools.lru_cache(maxsize=8)(self._offset)
        self.permutation = functools.lru_cache(maxsize=32)(self._permutation)

    def spans(self, index: Sequence[int] | np.ndarray) -> Spans:
        """Of rows number `index`, counted through all epochs; `row` counts them as they are given."""
        return spans_of([self], np.zeros(len(index), np.int64), np.asarray(index, np.int64))

    @abc.abstractmethod
    def row_with(self, epoch: int, position: int) -> int:
        """The row of an epoch in which the token at `position` of the stream is."""

    @staticmethod
    @abc.abstractmethod
    def find(orders: Sequence[Any], source: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> Spans:
        """Of the rows `row` of an `epoch` of the orders number `source`, all int64 [n]."""

    def _offset(self, epoch: int) -> int:
        """Where the epoch begins in the stream, which may be shorter."""
        drawn = hashlib.sha256(f"offset/{self._key}/{epoch}".encode()).digest()
        return int.from_bytes(drawn[:8], "big") % self.length

    def _permutation(self, epoch: int, size: int, of: str = "order") -> Permutation:
        return Permutation(size, f"{of}/{self._key}/{epoch}")


def spans_of(orders: Sequence[Order], source: np.ndarray, index: np.ndarray) -> Spans:
    """What `spans` says of rows number `index` of the orders number `source`, int64 [n] both; orders of one kind."""
    epoch, row = np.divmod(index, np.array([one.rows_per_epoch for one in orders])[source])
    return type(orders[0]).find(orders, source, epoch, row)


class Split(Order):
    """Every S tokens are a row."""

    @staticmethod
    def find(orders: Sequence[Split], source: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> Spans:
        epochs, which = _distinct(source, epoch)
        shuffles = [orders[one].permutation(e, orders[one].rows_per_epoch) for one, e in epochs]
        begin = permute(shuffles, which, row) * orders[0].length
        tokens = np.array([one.stream.tokens for one in orders])[source]
        offset = np.array([orders[one].offset(e) for one, e in epochs], np.int64)[which]
        return Spans(np.arange(len(row)), (offset + begin) % tokens, np.minimum(orders[0].length, tokens - begin))

    def row_with(self, epoch: int, position: int) -> int:
        begin = (position - self.offset(epoch)) % self.stream.tokens
        return self.permutation(epoch, self.rows_per_epoch).inverse(begin // self.length)


class BestFit(Order):
    """Every 16 S tokens, with what begins and ends in them, fill 16 rows: `_pieces` says what is done at their edges.

    Groups of 16 rows are shuffled, and then the rows of each 256 groups that follow each other: a row can be made of
    what is known of one group and of the one before it in the stream, which takes little longer where a host needs one
    row of a group than where it needs all, and neighbours in a batch come from all over the stream.
    """

    def __init__(self, stream: TokenStream, length: int, key: str, fits: Fits | None = None) -> None:
        super().__init__(stream, length, key)
        self.groups = self.rows_per_epoch // _GROUP
        """The last rows, too few for a group, are read last."""
        self.fits = fits or Fits()

    @staticmethod
    def find(orders: Sequence[BestFit], source: np.ndarray, epoch: np.ndarray, row: np.ndarray) -> Spans:
        group = np.array([one.groups for one in orders])[source]
        inside = row - group * _GROUP
        full = np.flatnonzero(inside < 0)
        block, place = np.divmod(row[full], _GROUP * _GROUPS)
        blocks, which = _distinct(source[full], epoch[full], block)
        place = permute([orders[one].row_shuffle(e, number) for one, e, number in blocks], which, place)
        epochs, which = _distinct(source[full], epoch[full])
        chosen, inside[full] = block * _GROUPS + place // _GROUP, place % _GROUP
        group[full] = permute([orders[one].group_shuffle(e) for one, e in epochs], which, chosen)
        groups, which = _distinct(source, epoch, group)
        fits = orders[0].fits.get([(orders[one], e, number) for one, e, number in groups])
        before = np.cumsum([0, *(len(one.start) for one in fits)])[which]
        first, last = np.array([one.bounds for one in fits])[which, np.stack([inside, inside + 1])]
        count = last - first
        span = np.repeat(before + first - (np.cumsum(count) - count), count) + np.arange(count.sum())
        start, length = (np.concatenate(part)[span] for part in list(zip(*fits, strict=True))[:2])
        return Spans(np.repeat(np.arange(len(row)), count), start, length.astype(np.int64))

    def row_with(self, epoch: int, position: int) -> int:
        begin = (position - self.offset(epoch)) % self.stream.tokens
        nominal = begin // (self.length * _GROUP)
        # It may be given away at an edge.
        for group in (nominal, max(nominal - 1, 0), min(nominal + 1, (self.rows_per_epoch - 1) // _GROUP)):
            start, length, bounds = self.fits.get([(self, epoch, group)])[0]
            there = np.flatnonzero((start <= position) & (position < start + length))
            if len(there):
                break
        inside = int(np.searchsorted(bounds, there[0], side="right")) - 1
        if group == self.groups:
            return group * _GROUP + inside
        block, place = divmod(self.group_shuffle(epoch).inverse(group), _GROUPS)
        return block * _GROUP * _GROUPS + self.row_shuffle(epoch, block).inverse(place * _GROUP + inside)

    def group_shuffle(self, epoch: int) -> Permutation:
        """Of the groups of an epoch."""
        return self.permutation(epoch, self.groups, "groups")

    def row_shuffle(self, epoch: int, block: int) -> Permutation:
        """Of the rows of up to 256 groups."""
        return self.permutation(epoch, min(_GROUPS, self.groups - block * _GROUPS) * _GROUP, f"rows/{block}")


class _Fit(NamedTuple):
    """The spans of a group, row by row: those of row r from number `bounds[r]` up to `bounds[r + 1]`."""

    start: np.ndarray
    """int64 [n]"""
    length: np.ndarray
    """int32 [n]"""
    bounds: np.ndarray
    """int32 [17]"""


class Fits:
    """The spans of groups, of which those are kept that were used last."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[_Group, _Fit] = collections.OrderedDict()
        self._spans = 0

    def get(self, groups: list[_Group]) -> list[_Fit]:
        """Of each (order, epoch, group in it)."""
        missing = [one for one in groups if one not in self._kept]
        for i in range(0, len(missing), _AT_ONCE):
            some = missing[i : i + _AT_ONCE]
            for one, fit in zip(some, _fit(some), strict=True):
                self._kept[one] = fit
                self._spans += len(fit.start)
        for one in groups:
            self._kept.move_to_end(one)
        found = [self._kept[one] for one in groups]
        while self._spans > _SPANS_KEPT:
            self._spans -= len(self._kept.popitem(last=False)[1].start)
        return found


_Group = tuple[BestFit, int, int]


def _fit(groups: list[_Group]) -> list[_Fit]:
    length = groups[0][0].length
    tokens, offset = np.array([(one.stream.tokens, one.offset(epoch)) for one, epoch, _ in groups]).T
    offset %= tokens
    begin = np.array([group for _, _, group in groups]) * _GROUP * length
    end = np.minimum(begin + _GROUP * length, tokens)
    start, stop, cut, owner = _pieces([one.stream for one, _, _ in groups], tokens, offset, begin, end, length)
    placed = best_fit(stop - start, cut, owner, -(-(end - begin) // length), length)
    cell = owner[placed.piece] * _GROUP + placed.row
    order = np.argsort(cell * len(start) + placed.piece)  # a piece is in a row but once
    piece = placed.piece[order]
    at = (start[piece] + placed.offset[order] + offset[owner[piece]]) % tokens[owner[piece]]
    count = placed.length[order].astype(np.int32)
    bounds = np.zeros((len(groups), _GROUP + 1), np.int32)
    np.cumsum(np.bincount(cell, minlength=len(groups) * _GROUP).reshape(-1, _GROUP), axis=1, out=bounds[:, 1:])
    last = np.cumsum(bounds[:, -1]).tolist()
    spans = zip([0, *last], last, bounds, strict=False)
    return [_Fit(at[a:b].copy(), count[a:b].copy(), one.copy()) for a, b, one in spans]


def _pieces(
    streams: list[TokenStream], tokens: np.ndarray, offset: np.ndarray, begin: np.ndarray, end: np.ndarray, length: int
) -> tuple[np.ndarray, ...]:
    """int64 [n] starts and ends of the pieces in groups that nominally are from int64 [G] `begin` up to `end` in epochs
    that begin at the `offset` of a stream of `tokens`; whether each is part of a document, and its group's number.

    A document that fits in a row is not cut where a group ends: all of it is in the group that it begins in, and as
    many tokens of the last of those documents in that group that do not fit in a row are in the next group instead.
    So what is known of a group and of the one before it says what is in it.
    """
    most = _GROUP * length
    low, high = np.maximum(begin - most, 0), np.minimum(end + length, tokens)
    found: list[Any] = []
    counts = []
    places = (one.tolist() for one in (low + offset, high + offset, tokens))
    for stream, first, last, turn in zip(streams, *places, strict=True):
        some = stream.document_starts(first + 1, min(last, turn))
        found += [(first,), some]
        counts.append(1 + len(some))
        if last > turn:
            some = stream.document_starts(max(first + 1 - turn, 0), last - turn)
            found.append(some + turn)
            counts[-1] += len(some)
    owner = np.repeat(np.arange(len(streams)), counts)
    start = np.concatenate(found) - offset[owner]
    stop = np.append(start[1:], 0)
    stop[np.cumsum(counts) - 1] = high

    def exchanged(edge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which pieces are not cut at the edge of each group, and of which pieces as much is given for each."""
        here = edge[owner]
        across = np.flatnonzero((start < here) & (stop > here) & (stop - start <= length))
        inside = np.minimum(stop, here) - np.maximum(start, here - most)
        given = np.full(len(streams), -1)
        longer = np.flatnonzero((stop <= here) & (inside > length))
        given[owner[longer]] = longer  # the last of each group
        across = across[given[owner[across]] >= 0]
        return across, given[owner[across]]

    first, last = np.maximum(start, begin[owner]), np.minimum(stop, end[owner])
    cut = (first > start) | (last < stop) | (start == 0) | (stop == tokens[owner])
    kept = first < last
    across, given = exchanged(end)
    last[across], cut[across] = stop[across], False
    last[given] -= stop[across] - end[owner[across]]
    cut[given] = True
    across, given = exchanged(begin)
    first[across] = stop[given] - (stop[across] - begin[owner[across]])
    last[across] = stop[given]
    return first[kept], last[kept], cut[kept], owner[kept]


def _distinct(*columns: np.ndarray) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """The different tuples of int [n] columns, and int64 [n] which of them each is."""
    found: dict[tuple[int, ...], int] = {}
    which = [found.setdefault(one, len(found)) for one in zip(*(x.tolist() for x in columns), strict=True)]
    return list(found), np.array(which, np.int64)


def make_orders(packing: str, streams: Sequence[TokenStream], length: int, keys: Sequence[str]) -> Sequence[Order]:
    """For the streams, with what `data.packing` may be."""
    fits = Fits()
    if packing == "best_fit":
        return [BestFit(stream, length, key, fits) for stream, key in zip(streams, keys, strict=True)]
    return [Split(stream, length, key) for stream, key in zip(streams, keys, strict=True)]
