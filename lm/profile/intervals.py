"""Sets of moments, as sorted intervals that do not touch."""

from collections.abc import Iterable

Interval = tuple[float, float]


def merged(intervals: Iterable[Interval]) -> list[Interval]:
    """The moments in any of them."""
    found: list[Interval] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif end > begin:
            found.append((begin, end))
    return found


def without(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The moments of `a` that are not in `b`; both as `merged` gives them."""
    found, i = [], 0
    for begin, end in a:
        while i < len(b) and b[i][1] <= begin:
            i += 1
        j = i
        while j < len(b) and b[j][0] < end:
            if b[j][0] > begin:
                found.append((begin, b[j][0]))
            begin = max(begin, b[j][1])
            j += 1
        if begin < end:
            found.append((begin, end))
    return found


def common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """The moments of both."""
    return without(a, without(a, b))


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
