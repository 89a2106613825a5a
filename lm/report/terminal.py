"""Curves as text: in colours and fine dots on a terminal, in plain characters elsewhere."""

import itertools
import math
import os
import shutil
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TextIO

from lm.report.curves import Curve, Curves
from lm.train.progress import human_count

COLOURS = ("blue+", "orange+", "green+", "red+", "magenta+", "cyan+", "gray+")
_PLAIN = str.maketrans("┌┐└┘├┤┬┴┼─│…", "++++++++++|.")
MOST_LINES = 30


@dataclass(frozen=True)
class Canvas:
    """What is drawn on."""

    columns: int
    lines: int
    plain: bool
    """Without colours, in ASCII."""

    @classmethod
    def of(cls, stream: TextIO) -> Self:
        """The size of the terminal, as far as there is one; NO_COLOR (no-color.org) is heeded."""
        columns, lines = shutil.get_terminal_size()
        unicode = (getattr(stream, "encoding", None) or "").lower().replace("-", "") == "utf8"
        live = stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
        return cls(columns, min(lines - 4, MOST_LINES), plain=not (live and unicode))


def drawn(found: Curves, canvas: Canvas) -> Iterator[str]:
    """Lines: the plot, and below what is what, with the last value and the least."""
    import plotext

    width, height = max(canvas.columns - 1, 20), max(canvas.lines, 8)  # a full last column would wrap on some terminals
    marks = itertools.cycle("*" if len(found.curves) == 1 else string.ascii_lowercase)
    styles = list(zip(found.curves, marks, itertools.cycle(COLOURS), strict=False))
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plot_size(width, height)
    for curve, mark, colour in styles:
        for xs, ys in _pieces(curve, 2 * width, found.log):
            plot = plotext.plot if len(xs) > 1 else plotext.scatter
            plot(xs, ys, marker=mark if canvas.plain else "braille", color=None if canvas.plain else colour)
    _axes(plotext, found, width, height)
    plotext.title(found.y_label + (" (logarithmic)" if found.log else ""))
    plotext.xlabel(found.x_label)
    text = plotext.build()
    text = plotext.uncolorize(text).translate(_PLAIN) if canvas.plain else text
    yield from (line.rstrip() for line in text.splitlines())
    for curve, mark, colour in styles:
        sign = mark if canvas.plain else plotext.colorize("━━", colour)
        finite = [y for y in curve.y if not math.isnan(y)]
        yield f"{sign} {curve.name}  last {finite[-1]:.4g}, least {min(finite):.4g}"


def _pieces(curve: Curve, buckets: int, log: bool) -> Iterator[tuple[list[float], list[float]]]:
    """Between the gaps; of many points, the least and the greatest of each bucket, so that spikes stay."""
    points = [(x, math.log10(y) if log and y > 0 else y) for x, y in zip(curve.x, curve.y, strict=True)]
    for gap, group in itertools.groupby(points, key=lambda point: math.isnan(point[1])):
        piece = list(group)
        if not gap:
            kept = _thinned(piece, buckets) if len(piece) > 2 * buckets else piece
            yield [x for x, _ in kept], [y for _, y in kept]


def _thinned(points: Sequence[tuple[float, float]], buckets: int) -> list[tuple[float, float]]:
    size = math.ceil(len(points) / buckets)
    kept = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def _axes(plotext: Any, found: Curves, width: int, height: int) -> None:
    """Limits, and marks at round numbers, which plotext has not."""
    xs = [x for curve in found.curves for x in curve.x]
    ys = [y for curve in found.curves for y in curve.y if not math.isnan(y)]
    x_marks = marks_in(min(xs), max(xs), max(width // 12, 2))
    plotext.xticks(x_marks, [human_count(x) for x in x_marks])
    low, high = min(ys), max(ys)
    y_marks = log_marks_in(low, high, height // 3) if found.log else marks_in(low, high, max(height // 3, 2))
    places = [math.log10(y) for y in y_marks] if found.log else y_marks
    plotext.yticks(places, [f"{y:.6g}" for y in y_marks])
    if low == high:  # a flat line needs room
        middle = math.log10(low) if found.log else low
        plotext.ylim(middle - 1, middle + 1)
    if min(xs) == max(xs):
        plotext.xlim(min(xs) - 1, max(xs) + 1)


def marks_in(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, at most so many; at least one number."""
    if not low < high:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * step for step in (1, 2, 5, 10, 20) if power * step >= rough)
    first = math.ceil(low / size - 1e-9)
    return [float(f"{n * size:.10g}") for n in range(first, math.floor(high / size + 1e-9) + 1)] or [low]


def log_marks_in(low: float, high: float, most: int) -> list[float]:
    """Powers of ten; for less than a few of them, as `marks_in`."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 2:
        return [mark for mark in marks_in(low, high, most) if mark > 0]
    return [10.0**power for power in range(first, last + 1, math.ceil((last - first + 1) / max(most, 1)))]
