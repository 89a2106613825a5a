"""A trace in one form, whichever devices it is of: which operation ran when, on which device, in which step.

What the profiler writes, by platform:

    TPU   a plane /device:TPU:N each; on its line "XLA Ops" operations, those in a loop inside of the loop; on "Async
          XLA Ops" what goes on beside them, from its start to its end; on "XLA Modules" each run of a program
    GPU   a plane /device:GPU:N each; on a line for each stream the kernels, with the operation that they are of
    CPU   all on the plane /host:CPU: on a line for each thread operations, with device, program and run

Times are of the clock of the trace, in seconds.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lm.profile.intervals import Interval, merged
from lm.profile.kinds import LOOPS, is_asynchronous
from lm.profile.programs import Operation, Programs

STEP_PROGRAM = "jit_train_step"
_PICO = 1e-12
_DERIVED = ("Steps", "XLA Modules", "XLA Ops", "Framework", "TensorFlow", "Source", "Launch Stats", "Async XLA Ops")
_EVENT_ANNOTATION = "lm: "


@dataclasses.dataclass(frozen=True)
class Span:
    """An operation runs, and none that it contains does."""

    operation: Operation
    begin: float
    end: float
    first: bool = True
    """Of those of one run of the operation: what contains others is in several spans."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclasses.dataclass
class Device:
    name: str
    spans: list[Span]
    beside: list[Span]
    """What asynchronous operations do, from start to end, while others run."""
    runs: list[Interval]
    """Of the program of the step, in order."""


@dataclasses.dataclass(frozen=True)
class Trace:
    platform: str
    """tpu, gpu or cpu."""
    kind: str
    """Of the devices, as far as the trace says."""
    devices: list[Device]
    """Those on which something ran."""
    steps: tuple[int, ...]
    """By their annotations."""
    host: Mapping[str, list[Interval]]
    """What the loop of training spent its time on (lm/train/meter.py), by name."""


def trace_of(space: Any) -> Trace:
    """Of an XSpace (lm/profile/xplane.py). Without any device operation there are no devices."""
    programs = Programs(space)
    planes = {plane.name: plane for plane in space.planes}
    tpus = [p for name, p in planes.items() if re.fullmatch(r"/device:TPU:\d+", name)]
    gpus = [p for name, p in planes.items() if re.fullmatch(r"/device:GPU:\d+", name)]
    host = planes.get("/host:CPU")
    if tpus:
        platform, devices = "tpu", [_tpu(plane, programs) for plane in tpus]
    elif any(line.events for plane in gpus for line in plane.lines):
        platform, devices = "gpu", [_gpu(plane, programs) for plane in gpus]
    else:
        platform, devices = "cpu", _cpus(host, programs) if host else []
    steps, waits = _annotations(host) if host else ((), {})
    devices = [device for device in devices if device.spans]
    for device in devices:
        device.runs = device.runs[-len(steps) :] if steps else device.runs
    kind = next((str(_stats(p, p.stats).get("device_type_string", "")) for p in (*tpus, *gpus)), "")
    return Trace(platform, kind, devices, steps, waits)


# Platforms


def _tpu(plane: Any, programs: Programs) -> Device:
    runs: dict[str, list[Interval]] = defaultdict(list)
    spans: list[Span] = []
    beside: list[Span] = []
    numbers: dict[str, int] = {}
    for line in plane.lines:
        if line.name == "XLA Modules":
            for event in line.events:
                name, _, rest = plane.event_metadata[event.metadata_id].name.partition("(")
                runs[name].append(_interval(line, event))
                number = _stats(plane, event.stats).get("program_id", rest.rstrip(")"))
                numbers[name] = int(number) if str(number).isdigit() else 0
    program = _step_program(runs)
    operations = _Operations(plane, programs, default=numbers.get(program, 0))
    for line in plane.lines:
        events = [(operations.of(event), _interval(line, event)) for event in line.events]
        if line.name == "XLA Ops":
            spans += _unnested(events)
        elif line.name == "Async XLA Ops":
            beside += [Span(operation, *interval) for operation, interval in events]
    return Device(plane.name, spans, beside, sorted(runs.get(program, [])))


def _gpu(plane: Any, programs: Programs) -> Device:
    operations, spans = _Operations(plane, programs), list[Span]()
    of_program: dict[str, list[Span]] = defaultdict(list)
    for line in plane.lines:
        if line.name.startswith(_DERIVED):
            continue
        for event in line.events:
            stats = _stats(plane, event.stats)
            span = Span(operations.of(event, stats), *_interval(line, event))
            spans.append(span)
            of_program[str(stats.get("hlo_module", ""))].append(span)
    of_program.pop("", None)
    program = _step_program({name: [(s.begin, s.end) for s in found] for name, found in of_program.items()})
    return Device(plane.name, spans, [], _runs_by_kernels(of_program.get(program, [])))


def _cpus(plane: Any, programs: Programs) -> list[Device]:
    operations = _Operations(plane, programs)
    spans: dict[int, list[Span]] = defaultdict(list)
    runs: dict[int, dict[str, dict[Any, list[Interval]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    names = {number for number, one in plane.stat_metadata.items() if one.name == "hlo_op"}
    for line in plane.lines:
        events: dict[int, list[tuple[Operation, Interval]]] = defaultdict(list)
        for event in line.events:
            if not any(stat.metadata_id in names for stat in event.stats):
                continue
            stats, interval = _stats(plane, event.stats), _interval(line, event)
            device = int(stats.get("device_ordinal", 0))
            events[device].append((operations.of(event, stats), interval))
            runs[device][str(stats.get("hlo_module", ""))][stats.get("run_id", 0)].append(interval)
        for device, found in events.items():
            # A thread in a loop or call waits for others, which have the operations.
            spans[device] += [span for span in _unnested(found) if span.operation.kind != LOOPS]
    made = []
    for device in sorted(spans):
        program = _step_program(
            {name: [one for run in by.values() for one in run] for name, by in runs[device].items()}
        )
        whole = [(min(b for b, _ in run), max(e for _, e in run)) for run in runs[device][program].values()]
        made.append(Device(f"/device:CPU:{device}", spans[device], [], sorted(whole)))
    return made


def _runs_by_kernels(spans: list[Span]) -> list[Interval]:
    """GPUs do not say when a program begins. Of what runs once in each run, the last one ends it."""
    counts: dict[str, int] = defaultdict(int)
    for span in spans:
        counts[span.operation.name] += 1
    once = [span for span in spans if span.operation.entry]
    if not once:
        return [(min(s.begin for s in spans), max(s.end for s in spans))] if spans else []
    fewest = min(counts[span.operation.name] for span in once)
    last = max((s for s in once if counts[s.operation.name] == fewest), key=lambda span: span.end)
    ends = sorted(span.end for span in spans if span.operation is last.operation)
    ends[-1] = max(span.end for span in spans)
    begins, found = sorted(span.begin for span in spans), list[Interval]()
    for i, end in enumerate(ends):
        begin = next((b for b in begins if i == 0 or b >= ends[i - 1]), None)
        if begin is not None and begin < end:
            found.append((begin, end))
    return found


def _step_program(found: Mapping[str, Iterable[Interval]]) -> str:
    """The program that is traced: that of lm, or else the one that takes most of the time."""
    if STEP_PROGRAM in found:
        return STEP_PROGRAM
    return max(found, key=lambda name: sum(end - begin for begin, end in found[name]), default="")


def _annotations(plane: Any) -> tuple[tuple[int, ...], dict[str, list[Interval]]]:
    steps: set[int] = set()
    waits: dict[str, list[Interval]] = defaultdict(list)
    for line in plane.lines:
        for event in line.events:
            name = plane.event_metadata[event.metadata_id].name
            if name == "train" and (number := _stats(plane, event.stats).get("step_num")) is not None:
                steps.add(int(number))
            elif name.startswith(_EVENT_ANNOTATION):
                waits[name.removeprefix(_EVENT_ANNOTATION)].append(_interval(line, event))
    return tuple(sorted(steps)), {name: merged(found) for name, found in waits.items()}


# Events


class _Operations:
    """What the events of a plane are, each kind of which is looked up once."""

    def __init__(self, plane: Any, programs: Programs, default: int = 0):
        self._plane, self._programs, self._default = plane, programs, default
        self._known: dict[tuple[Any, ...], Operation] = {}

    def of(self, event: Any, stats: Mapping[str, Any] | None = None) -> Operation:
        stats = stats or {}
        key = event.metadata_id, stats.get("hlo_op"), stats.get("program_id"), stats.get("hlo_module")
        if key not in self._known:
            self._known[key] = self._find(event, stats)
        return self._known[key]

    def _find(self, event: Any, stats: Mapping[str, Any]) -> Operation:
        metadata = self._plane.event_metadata[event.metadata_id]
        known = _stats(self._plane, metadata.stats) | dict(stats)
        name = str(known.get("hlo_op") or metadata.display_name or metadata.name)
        if name.startswith("%"):  # the whole line of the program
            name = name[1:].partition(" ")[0]
        category, op_name = str(known.get("hlo_category", "")), str(known.get("tf_op", ""))
        found = self._programs.find(
            name,
            number=int(known.get("program_id", self._default)),
            program=str(known.get("hlo_module", "")),
            category=category,
            op_name=str(known.get("name", "")) if op_name == "XlaModule:" else op_name,
            source=str(known.get("source", "")),
        )
        if not found.op_name and not known.get("hlo_op") and is_asynchronous(category):
            return dataclasses.replace(found, asynchronous=True)
        return found


def _unnested(events: list[tuple[Operation, Interval]]) -> Iterator[Span]:
    """Each moment belongs to the innermost of the operations that contain it."""
    stack: list[tuple[Operation, float, bool]] = []  # with the end of each, and whether it has no span yet
    now = 0.0

    def until(end: float) -> Iterator[Span]:
        nonlocal now
        if end > now:
            operation, last, first = stack[-1]
            yield Span(operation, now, end, first)
            stack[-1] = operation, last, False
        now = max(now, end)

    for operation, (begin, end) in sorted(events, key=lambda event: (event[1][0], -event[1][1])):
        while stack and stack[-1][1] <= begin:
            yield from until(stack[-1][1])
            stack.pop()
        if stack:
            yield from until(begin)
            end = min(end, stack[-1][1])
        stack.append((operation, end, True))
        now = begin
    while stack:
        yield from until(stack[-1][1])
        stack.pop()


def _interval(line: Any, event: Any) -> Interval:
    begin = line.timestamp_ns * 1000 + event.offset_ps  # whole numbers, as times since 1970 would not fit a float
    return begin * _PICO, (begin + event.duration_ps) * _PICO


def _stats(plane: Any, stats: Iterable[Any]) -> dict[str, Any]:
    found = {}
    for stat in stats:
        value = stat.WhichOneof("value")
        if value == "ref_value":
            found[plane.stat_metadata[stat.metadata_id].name] = plane.stat_metadata[stat.ref_value].name
        elif value:
            found[plane.stat_metadata[stat.metadata_id].name] = getattr(stat, value)
    return found
