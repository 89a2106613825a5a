"""Which pieces of documents make up a row, so that few are cut and no room is left."""

from __future__ import annotations

import bisect

import numpy as np


def best_fit(lengths: np.ndarray, cut: np.ndarray, rows: int, capacity: int) -> list[tuple[int, int, int, int]]:
    """(row, piece, offset in it, tokens of it) for pieces of int [n] `lengths`, at most rows * capacity in all.

    Best-fit decreasing, as in Ding et al., "Fewer Truncations Improve Language Modeling" (2024): what is longer than a
    row fills rows; of the rest, the longest first, each goes where it leaves least room. As the rows are given and
    nothing may be left out, what then fits nowhere is cut to fill what room there is, the largest first. To spare whole
    documents they are placed before what is cut anyway: the end of what is longer than a row, and pieces that bool [n]
    `cut` marks as parts of a document.
    """
    placed: list[tuple[int, int, int, int]] = []
    rests = np.array(lengths, np.int64)
    last = cut | (rests > capacity)
    row = 0
    for piece in np.flatnonzero(rests >= capacity).tolist():
        whole, rests[piece] = divmod(int(rests[piece]), capacity)
        placed += [(row + i, piece, i * capacity, capacity) for i in range(whole)]
        row += whole
    # Free tokens of a row and its number in one integer, ascending.
    free = [capacity * rows + i for i in range(row, rows)]
    left = []
    order = np.lexsort((-rests, last))
    order = order[rests[order] > 0]
    for piece, length in zip(order.tolist(), rests[order].tolist(), strict=True):
        found = bisect.bisect_left(free, length * rows)
        if found == len(free):
            left.append((piece, length))
            continue
        room, row = divmod(free.pop(found), rows)
        placed.append((row, piece, int(lengths[piece]) - length, length))
        if room > length:
            bisect.insort(free, (room - length) * rows + row)
    for piece, length in sorted(left, key=lambda one: -one[1]):
        while length:
            room, row = divmod(free.pop(), rows)
            part = min(room, length)
            placed.append((row, piece, int(lengths[piece]) - length, part))
            length -= part
            if room > part:
                bisect.insort(free, (room - part) * rows + row)
    return placed
