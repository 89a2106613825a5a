"""Speed: tokens, FLOPs and waiting between one logged step and the next."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Counts time from one `read` to the next; what is spent in `paused` is not training time.

    Metrics arrive one step late, so the clock runs from arrival to arrival: over many steps, that is their time.
    """

    def __init__(self, *, tokens_per_step: int, flops_per_token: float, peak_flops: float | None):
        self.tokens_per_step = tokens_per_step
        self._flops_per_token, self._peak = flops_per_token, peak_flops
        self.latest: dict[str, float] = {}
        self.intervals = 0
        """How many were read."""
        self._all_steps, self._all_seconds = 0, 0.0

    def start(self, step: int) -> None:
        """Before the first step of this start, `step`."""
        self._from_step, self._from_time = step, time.monotonic()
        self._paused = self._waited = 0.0

    def read(self, step: int) -> dict[str, float]:
        """Values for metrics.jsonl: means over the steps after the last `read`, up to and with `step`."""
        steps = step + 1 - self._from_step
        seconds = max(time.monotonic() - self._from_time - self._paused, 1e-9)
        if self.intervals:
            self._all_steps, self._all_seconds = self._all_steps + steps, self._all_seconds + seconds
        self.intervals += 1
        speed = steps * self.tokens_per_step / seconds
        self.latest = {
            "tokens": (step + 1) * self.tokens_per_step,
            "tokens_per_second": speed,
            "step_seconds": seconds / steps,
            "input_wait_seconds": self._waited / steps,
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

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For evaluations and saves."""
        begin = time.monotonic()
        yield
        self._paused += time.monotonic() - begin

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time in which the next batch is not there yet."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin
