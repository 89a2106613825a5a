"""Speed: tokens, FLOPs and waiting between one logged step and the next; and what this process spends by itself."""

import collections
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jax.profiler import TraceAnnotation

_Sums = collections.defaultdict[str, float]

PAUSES = ("save", "evaluation", "profile")
"""What is no training time."""
PARTS = {"devices": "compute", "input": "input", "others": "others", "save": "save", "evaluation": "evaluation"}
"""What the host waits for, or does, and what it is called in metrics.jsonl; the rest is the host's."""
ANNOTATION = "lm: "
"""Before the name, of what is spent here, in traces of the profiler."""


class Meter:
    """Counts time from one `read` to the next, of which what is spent in PAUSES is not training time.

    Metrics arrive one step late, so the clock runs from arrival to arrival: over many steps, that is their time.
    """

    def __init__(self, *, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
        self.tokens_per_step = tokens_per_step
        self._flops_per_token, self._peak = flops_per_token, peak_flops
        self.latest: dict[str, float] = {}
        self.intervals = 0
        """How many were read."""
        self._all_steps, self._all_seconds = 0, 0.0
        self._own = _Sums(float), _Sums(float)  # of the last turn, and of this one

    def start(self, step: int) -> None:
        """Before the first step of this start, `step`."""
        self._from_step, self._from_time = step, time.monotonic()
        self._spent = _Sums(float)

    def read(self, step: int) -> dict[str, float]:
        """Values for metrics.jsonl: means over the steps after the last `read`, up to and with `step`."""
        steps = step + 1 - self._from_step
        spent = self._spent
        seconds = max(time.monotonic() - self._from_time - sum(spent[what] for what in PAUSES), 1e-9)
        host = max(seconds - sum(spent[what] for what in spent.keys() - set(PAUSES)), 0.0)
        for what, value in {**spent, "host": host, "steps": steps}.items():
            self._own[1][what] += value
        if self.intervals:
            self._all_steps, self._all_seconds = self._all_steps + steps, self._all_seconds + seconds
        self.intervals += 1
        speed = steps * self.tokens_per_step / seconds
        self.latest = {
            "tokens": (step + 1) * self.tokens_per_step,
            "tokens_per_second": speed,
            "step_seconds": seconds / steps,
            **{f"step_seconds/{PARTS[what]}": spent[what] / steps for what in PARTS},
            "step_seconds/host": host / steps,
            "model_flops_per_second": speed * self._flops_per_token,
        }
        if self._peak is not None:
            self.latest["mfu"] = speed * self._flops_per_token / self._peak
        self.start(step + 1)
        return self.latest

    @property
    def mean_step_seconds(self) -> float | None:
        """Over all steps that were read but those of the first interval, in which everything happens for the first
        time; None before there are such."""
        return self._all_seconds / self._all_steps if self._all_steps else None

    @property
    def own(self) -> dict[str, float]:
        """Seconds per step by cause (lm/train/slowest.py), means since the turn before the last. After a `read`."""
        before, now = self._own
        steps = before["steps"] + now["steps"]
        return {what: (before[what] + now[what]) / steps for what in ("input", "host", *PAUSES)}

    def turn(self) -> None:
        """To be called now and then: what was before the last turn does not count for `own` any more."""
        self._own = self._own[1], _Sums(float)

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """For the time in which this process waits for "input", "devices" or "others", or does what is in PAUSES."""
        begin = time.monotonic()
        with TraceAnnotation(ANNOTATION + what):
            yield
        self._spent[what] += time.monotonic() - begin
