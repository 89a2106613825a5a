"""Where the time of the traced steps went, by kind, part of the model and operation; what was hidden and what waited.

Figures are of one device and step: means over the devices that are in the trace and the steps that they did.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable

from lm.profile.intervals import Interval, common, length, merged, without
from lm.profile.kinds import COLLECTIVES, HOST, LOOPS
from lm.profile.programs import Operation
from lm.profile.trace import Device, Span, Trace


@dataclasses.dataclass(frozen=True)
class Row:
    """Operations of one kind, part of the model, or name."""

    name: str
    seconds: float
    """Of the operations themselves, not of what they contain. Where they run beside each other, on the streams of a GPU
    or the threads of a CPU, more than pass."""
    times: float
    """How many ran."""


@dataclasses.dataclass(frozen=True)
class OperationRow(Row):
    kind: str
    part: str
    backward: bool
    again: bool
    source: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind, or transfers to and from the host."""

    kind: str
    seconds: float
    """In which at least one was under way."""
    exposed: float
    """Of these, those in which nothing was computed."""


@dataclasses.dataclass(frozen=True)
class Summary:
    platform: str
    device_kind: str
    devices: int
    steps: tuple[int, ...]
    """Those that have an annotation; a trace of something else has none."""
    runs: int
    """How many steps each device did."""
    step_seconds: float
    """From the begin of the first step to the end of the last."""
    busy: float
    """In which at least one operation ran."""
    between: float
    """In which no step was under way, and nothing else ran: the device waits for the host."""
    inside: float
    """In which a step was under way, and nothing ran."""
    waits: dict[str, float]
    """Of `between`, what the host did: input, others, save, evaluation, profile, or devices, for which it waits too."""
    kinds: tuple[Row, ...]
    parts: tuple[Row, ...]
    operations: tuple[OperationRow, ...]
    exchanges: tuple[Exchange, ...]

    @property
    def total(self) -> float:
        """Seconds of all operations."""
        return sum(row.seconds for row in self.kinds)

    def share(self, kind: str) -> float:
        """Of the seconds of all operations; 0 to 1."""
        return sum(row.seconds for row in self.kinds if row.name == kind) / self.total if self.total else 0.0


def summarize(trace: Trace) -> Summary:
    """Of the steps, where the trace says when they ran; else of all.

    Raises ValueError for a trace without device operations.
    """
    if not trace.devices:
        raise ValueError("no operation of any device")
    views = [_View(device) for device in trace.devices]
    count = len(views)

    def mean(seconds: Callable[[_View], float]) -> float:
        return sum(seconds(view) / view.runs for view in views) / count

    def wait(found: list[Interval]) -> float:
        return mean(lambda view: length(common(view.between, found)))

    def exchange(kind: str) -> Exchange:
        return Exchange(
            kind,
            mean(lambda view: length(view.exchanged.get(kind, []))),
            mean(lambda view: length(without(view.exchanged.get(kind, []), view.computing))),
        )

    seconds, times = defaultdict[Operation, float](float), defaultdict[Operation, float](float)
    for view in views:
        for span in view.spans:
            seconds[span.operation] += span.seconds / view.runs / count
            times[span.operation] += span.first / view.runs / count

    def rows(key: Callable[[Operation], str]) -> tuple[Row, ...]:
        by_name = defaultdict[str, list[Operation]](list)
        for operation in seconds:
            by_name[key(operation)].append(operation)
        found = [
            Row(name, sum(seconds[one] for one in same), sum(times[one] for one in same))
            for name, same in by_name.items()
        ]
        return tuple(sorted(found, key=lambda row: -row.seconds))

    exchanged = [kind for kind in (*COLLECTIVES, HOST) if any(kind in view.exchanged for view in views)]
    operations = (_described(operation, seconds[operation], times[operation]) for operation in seconds)
    return Summary(
        platform=trace.platform,
        device_kind=trace.kind,
        devices=count,
        steps=trace.steps,
        runs=max(view.runs for view in views),
        step_seconds=mean(lambda view: view.end - view.begin),
        busy=mean(lambda view: length(view.busy)),
        between=mean(lambda view: length(view.between)),
        inside=mean(lambda view: length(view.inside)),
        waits={name: wait(found) for name, found in trace.host.items()},
        kinds=rows(lambda operation: operation.kind),
        parts=rows(lambda operation: operation.part),
        operations=tuple(sorted(operations, key=lambda row: -row.seconds)),
        exchanges=tuple(exchange(kind) for kind in exchanged),
    )


class _View:
    """What one device did in its steps."""

    def __init__(self, device: Device):
        self.runs = max(len(device.runs), 1)
        everything = device.runs or [(span.begin, span.end) for span in device.spans]
        self.begin, self.end = min(begin for begin, _ in everything), max(end for _, end in everything)
        self.spans = [cut for span in device.spans if (cut := self._cut(span))]
        beside = [cut for span in device.beside if (cut := self._cut(span))]
        exchanged = defaultdict[str, list[Interval]](list)
        computing: list[Interval] = []
        for span in (*self.spans, *beside):
            if span.operation.kind in (*COLLECTIVES, HOST):
                exchanged[span.operation.kind].append((span.begin, span.end))
        for span in self.spans:
            if span.operation.kind not in (*COLLECTIVES, HOST, LOOPS) and not span.operation.asynchronous:
                computing.append((span.begin, span.end))
        self.exchanged = {kind: merged(found) for kind, found in exchanged.items()}
        self.computing = merged(computing)
        self.busy = merged((span.begin, span.end) for span in self.spans)
        idle = without([(self.begin, self.end)], self.busy)
        self.inside = common(idle, merged(device.runs or everything))
        self.between = without(idle, self.inside)

    def _cut(self, span: Span) -> Span | None:
        begin, end = max(span.begin, self.begin), min(span.end, self.end)
        return dataclasses.replace(span, begin=begin, end=end) if begin < end else None


def _described(operation: Operation, seconds: float, times: float) -> OperationRow:
    return OperationRow(
        operation.name,
        seconds,
        times,
        kind=operation.kind,
        part=operation.part,
        backward=operation.backward,
        again=operation.again,
        source=operation.source,
        op_name=operation.op_name,
    )
