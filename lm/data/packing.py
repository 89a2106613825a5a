"""Which pieces of documents make up a row, so that few are cut and no room is left."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Placed(NamedTuple):
    """Parts of pieces, and the row of the piece's group that each is in. All int64 [n]."""

    piece: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    """In the piece."""
    length: np.ndarray


def best_fit(lengths: np.ndarray, cut: np.ndarray, group: np.ndarray, rows: np.ndarray, capacity: int) -> Placed:
    """Fits pieces of int64 [n] `lengths` into the rows of the `group` of each, int64 [n] and ascending. Group g has
    int64 [G] `rows`, and no more tokens than `capacity` times that. Many groups at once take little longer than one.

    Best-fit decreasing, as in Ding et al., "Fewer Truncations Improve Language Modeling" (2024): what is longer than a
    row fills rows; of the rest, the longest first, each goes where it leaves least room. As the rows are given and
    nothing may be left out, what then fits nowhere is cut to fill what room there is. To spare whole documents they
    are placed before what is cut anyway: the end of what is longer than a row, and pieces that bool [n] `cut` marks as
    parts of a document.
    """
    rests = lengths % capacity
    full = _fill(lengths, group, rows, capacity)
    room = np.where(np.arange(rows.max())[:, None] < rows, capacity, 0)
    room[full.row, group[full.piece]] = 0
    last = cut | (lengths > capacity)
    pieces = np.flatnonzero(rests)
    pieces = pieces[_ascending((group[pieces] * 2 + last[pieces]) * capacity - rests[pieces])]
    row = _place(rests[pieces], group[pieces], room)
    placed, left = row >= 0, pieces[row < 0]
    whole = pieces[placed]
    left = left[_ascending(group[left] * capacity - rests[left])]
    parts = _cut(rests[left], group[left], room)
    return Placed(
        np.concatenate([full.piece, whole, left[parts.piece]]),
        np.concatenate([full.row, row[placed], parts.row]),
        np.concatenate([full.offset, (lengths - rests)[whole], (lengths - rests)[left][parts.piece] + parts.offset]),
        np.concatenate([full.length, rests[whole], parts.length]),
    )


def _ascending(key: np.ndarray) -> np.ndarray:
    """What sorts the int64 [n] keys; of those that are equal the first stays first."""
    count = max(len(key), 1)
    return np.sort(key * count + np.arange(len(key))) % count  # many times as fast as a stable argsort


def _fill(lengths: np.ndarray, group: np.ndarray, rows: np.ndarray, capacity: int) -> Placed:
    """The rows that one piece fills: the first of each group."""
    whole = lengths // capacity
    before = np.append(0, np.cumsum(whole))
    piece = np.repeat(np.arange(len(lengths)), whole)
    number = np.arange(len(piece))
    row = number - before[np.searchsorted(group, np.arange(len(rows)))][group[piece]]
    return Placed(piece, row, (number - before[piece]) * capacity, np.full(len(piece), capacity))


def _place(lengths: np.ndarray, group: np.ndarray, room: np.ndarray) -> np.ndarray:
    """int64 [n] the row of each piece, one after the other, where it leaves least of the int64 [R, G] `room`, which it
    takes; -1 where it fits nowhere."""
    rows, groups = room.shape
    counts = np.bincount(group, minlength=groups)
    # Groups of many pieces first: those that have a piece number p are the first ones.
    by_count = np.argsort(-counts, kind="stable")
    first = (np.cumsum(counts) - counts)[by_count]
    # Room and row in one number, the least of which is the best; unsigned, so that what does not fit is above all.
    kind: Any = np.uint32 if rows * (int(room.max()) + 1) < 1 << 31 else np.uint64
    limit = np.iinfo(kind).max // 2
    free = np.ascontiguousarray((room * rows + np.arange(rows)[:, None])[:, by_count], kind)
    sizes = (lengths * rows).astype(kind)
    flat, column, remains = free.reshape(-1), np.arange(groups), np.empty_like(free)
    found = np.empty(len(lengths), kind)
    for number, having in enumerate((groups - np.cumsum(np.bincount(counts))[:-1]).tolist()):
        piece = first[:having] + number
        best = np.subtract(free[:, :having], sizes[piece], out=remains[:, :having]).min(axis=0)
        at = best % rows * groups + column[:having]
        flat[at] = np.where(best <= limit, best, flat[at])
        found[piece] = best
    room[:, by_count] = free // rows
    return np.where(found <= limit, (found % rows).astype(np.int64), -1)


def _cut(lengths: np.ndarray, group: np.ndarray, room: np.ndarray) -> Placed:
    """Parts of the pieces, which are laid one after the other into the int64 [R, G] `room`, most of it first."""
    if not len(lengths):
        return Placed(*np.zeros((4, 0), np.int64))
    of, row = np.nonzero(room.T)
    size = room[row, of]
    order = _ascending(of * (size.max() + 1) - size)
    of, row = of[order], row[order]
    # Rooms and pieces along one line, of which each group has as much as its room; there may be less in it.
    rooms = np.append(0, np.cumsum(size[order]))
    done = np.append(0, np.cumsum(lengths))
    begins = rooms[np.searchsorted(of, group)] + done[:-1] - done[np.searchsorted(group, group)]
    points = np.unique(np.concatenate([rooms, begins]))
    piece = np.searchsorted(begins, points[:-1], side="right") - 1
    length = np.minimum(points[1:], (begins + lengths)[piece]) - points[:-1]
    there = (piece >= 0) & (length > 0)
    points, piece = points[:-1][there], piece[there]
    row = row[np.searchsorted(rooms, points, side="right") - 1]
    return Placed(piece, row, points - begins[piece], length[there])
