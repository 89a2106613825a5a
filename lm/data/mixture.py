"""Which source each row of a run is from, in closed form: no iteration to reach a row, however late."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

_BITS = 31
_ONE = 1 << _BITS  # shares are fractions of it: to 5e-10

Number = TypeVar("Number", int, np.ndarray)


class Shares:
    """Rows dealt out to sources by weight.

    The sources are split in two and each half again, by a Huffman tree. At a fork the rows of its two sides are as
    evenly interleaved as a line is drawn on a grid (Bresenham 1965): of the first n that come there, floor(n * share +
    1/2) go left. Of any n rows that follow each other each source has n times its share, give or take three, as what a
    fork rounds is halved by the next.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Weights above 0 by name; the order of the names does not matter."""
        total = sum(weights.values())
        self.names = sorted(name for name, weight in weights.items() if weight > 0)
        self.shares = {name: weights[name] / total for name in self.names}
        # A fork is known by its number, source i by ~i. Of each fork: the share of its left side in 1 / `_ONE`, and
        # what is to its left and to its right.
        forks: list[tuple[int, int, int]] = []
        heap = [(weights[name], i, ~i) for i, name in enumerate(self.names)]
        heapq.heapify(heap)
        while len(heap) > 1:
            light, _, right = heapq.heappop(heap)
            heavy, order, left = heapq.heappop(heap)
            share = min(max(round(heavy / (heavy + light) * _ONE), 1), _ONE - 1)
            heapq.heappush(heap, (heavy + light, order, len(forks)))
            forks.append((share, left, right))
        self._root = heap[0][2]
        self._forks = np.array(forks, np.int64).reshape(-1, 3).T
        self._path: list[list[tuple[int, bool]]] = [[] for _ in self.names]
        """Share, and whether the source is to the left, at each fork from the root to a source."""
        todo: list[tuple[int, list[tuple[int, bool]]]] = [(self._root, [])]
        while todo:
            node, path = todo.pop()
            if node < 0:
                self._path[~node] = path
            else:
                share, left, right = forks[node]
                todo += [(left, [*path, (share, True)]), (right, [*path, (share, False)])]

    def deal(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] which of `names` each of the int64 [n] rows is from, int64 [n] the how-manieth row of it."""
        node, index = np.full(len(rows), self._root), np.array(rows, np.int64)
        inside = np.flatnonzero(node >= 0)
        while len(inside):
            (share, left, right), came = self._forks[:, node[inside]], index[inside]
            before = _lefts(came, share)
            goes_left = _lefts(came + 1, share) > before
            index[inside] = np.where(goes_left, before, came - before)
            node[inside] = np.where(goes_left, left, right)
            inside = inside[node[inside] >= 0]
        return ~node, index

    def row(self, source: int, index: int) -> int:
        """The row that is number `index` of a source: what `deal` says, the other way."""
        for share, left in reversed(self._path[source]):
            if left:
                index = -((_ONE // 2 - (index + 1) * _ONE) // share) - 1
            else:
                index = (index * _ONE + _ONE // 2) // (_ONE - share)
        return index

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` each source has."""
        found = {}
        for name, path in zip(self.names, self._path, strict=True):
            count = rows
            for share, left in path:
                lefts = _lefts(count, share)
                count = lefts if left else count - lefts
            found[name] = count
        return found


class Mixture:
    """Rows of a run from named sources, with other weights from phase to phase."""

    def __init__(self, names: Sequence[str], phases: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """(first row, weights by name) of each phase, the first of them from row 0."""
        self._names = list(names)
        self._starts = [start for start, _ in phases]
        self._shares = [Shares(weights) for _, weights in phases]
        # How many rows of each source there were before each phase.
        self._before = [dict.fromkeys(names, 0)]
        for i, shares in enumerate(self._shares[:-1]):
            used = shares.counts(self._starts[i + 1] - self._starts[i])
            self._before.append({name: count + used.get(name, 0) for name, count in self._before[-1].items()})
        places = {name: i for i, name in enumerate(names)}
        self._tables = [
            np.array([(places[name], before[name]) for name in shares.names]).T
            for shares, before in zip(self._shares, self._before, strict=True)
        ]

    def deal(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] source (by its place in `names`) and how-manieth row of it, for int64 [n] rows of the run."""
        found = np.empty((2, len(rows)), np.int64)
        phases = np.searchsorted(np.array(self._starts[1:], np.int64), rows, side="right")
        for phase in sorted({*phases.tolist()}):
            here = np.flatnonzero(phases == phase)
            source, index = self._shares[phase].deal(rows[here] - self._starts[phase])
            places, before = self._tables[phase]
            found[:, here] = places[source], before[source] + index
        source, index = found
        return source, index

    def rows(self, source: int, index: int) -> int | None:
        """The row of the run that is number `index` of a source; None if none ever is."""
        name = self._names[source]
        for phase, (start, shares) in enumerate(zip(self._starts, self._shares, strict=True)):
            if name not in shares.shares:
                continue
            row = start + shares.row(shares.names.index(name), index - self._before[phase][name])
            if phase + 1 == len(self._starts) or row < self._starts[phase + 1]:
                return row
        return None

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` of the run each source has."""
        phase = self._phase(rows)
        used = self._shares[phase].counts(rows - self._starts[phase])
        return {name: count + used.get(name, 0) for name, count in self._before[phase].items()}

    def shares(self, row: int) -> dict[str, float]:
        """What of each source is read at a row of the run."""
        return self._shares[self._phase(row)].shares

    def _phase(self, row: int) -> int:
        return bisect.bisect_right(self._starts, row) - 1


def _lefts(rows: Number, share: Number) -> Number:
    """How many of the first `rows` of a fork go left."""
    high, low = rows >> _BITS, rows & (_ONE - 1)
    return high * share + ((low * share + _ONE // 2) >> _BITS)
