"""Where the wall time of a run went, across all its starts, from the events of its journal alone.

Good is the time in steps that nobody had done before. All the rest has a cause, and the causes add up to the wall time
from the first start to the last event.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lm.train.progress import human_seconds

CAUSES = (
    "step",  # new steps
    "replay",  # steps that an earlier start, or this one before it went back, had done
    "input",  # waiting for the next batch
    "save",  # held up by a save
    "evaluation",  # held-out text and samples
    "profile",  # beginning and writing traces
    "compile",  # compiling the step
    "restore",  # reading a checkpoint, or drawing the first state
    "start",  # start of the processes, data, until the first step
    "other",  # closing down, and what has no name
    "lost",  # of killed starts, what came after their last event; and the time until the next start
)


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Milliseconds by cause, and the number of starts that they are of."""

    milliseconds: Mapping[str, int]
    starts: int

    @property
    def total(self) -> int:
        return sum(self.milliseconds.values())

    def plus(self, milliseconds: Mapping[str, int]) -> "Goodput":
        """With more time of the last start."""
        more = {cause: had + milliseconds.get(cause, 0) for cause, had in self.milliseconds.items()}
        return dataclasses.replace(self, milliseconds=more)

    def values(self) -> dict[str, float]:
        """For metrics.jsonl and TensorBoard: each cause's share of the time, 0 to 1."""
        total = max(self.total, 1)
        shares = {f"goodput/{cause}": spent / total for cause, spent in self.milliseconds.items()}
        return shares | {"goodput/restarts": max(self.starts - 1, 0)}

    def line(self) -> str:
        """`goodput 93% of 3d04h: compile 4%, save 2%, lost 1%`"""
        percent = _percent(self.milliseconds)
        rest = sorted((cause for cause in percent if cause != "step" and percent[cause]), key=lambda c: -percent[c])
        where = ": " + ", ".join(f"{cause} {percent[cause]}%" for cause in rest) if rest else ""
        return f"goodput {percent['step']}% of {human_seconds(self.total / 1000)}{where}"


def goodput(events: Iterable[Mapping[str, Any]]) -> Goodput:
    """Of the events of a journal, in the order in which they were written.

    Durations are of the monotonic clock. The wall clock only says how long nothing ran, between the last event of a
    start and the begin of the next: never less than 0, however it jumps. A run that was done is not waited for.
    """
    first: dict[str, Mapping[str, Any]] = {}
    last: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if "start" in event:
            first.setdefault(event["start"], event)
            last[event["start"]] = event
    spent = dict.fromkeys(CAUSES, 0)
    idle_since: int | None = None
    for start, event in last.items():
        begin = _milliseconds(first[start]["time"]) - sum(first[start]["milliseconds"].values())
        if idle_since is not None:
            spent["lost"] += max(begin - idle_since, 0)
        for cause, time in event["milliseconds"].items():
            spent[cause if cause in spent else "other"] += time
        idle_since = None if event["event"] == "end" and event.get("code") == 0 else _milliseconds(event["time"])
    return Goodput(spent, len(last))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _percent(parts: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers in proportion to the parts that add up to 100: the largest remainders are rounded up."""
    total = max(sum(parts.values()), 1)
    whole = {name: part * 100 // total for name, part in parts.items()}
    left = 100 - sum(whole.values()) if any(parts.values()) else 0
    for name in sorted(parts, key=lambda name: -(parts[name] * 100 % total))[:left]:
        whole[name] += 1
    return whole
