"""Several machines that build one data directory, each its share of the parts. They meet in its files alone.

The first share also makes what all need: the plan, the tokenizer, what is found by looking at all parts together. The
others wait for the files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from lm.data.progress import Progress
from lm.errors import ConfigError

POLL_SECONDS = 1.0
_REMIND_SECONDS = 60.0


@dataclass(frozen=True)
class Share:
    """Of `count` shares the one with this index, counted from 0."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def lock(self) -> str:
        return f"build-{self.index + 1}-of-{self.count}.lock"

    def has(self, part: int) -> bool:
        return part % self.count == self.index


WHOLE = Share()


def parse_share(text: str) -> Share:
    """From 1/8 up to 8/8. Raises ConfigError for all else."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"--part: {text!r} is none; the first of eight machines has 1/8, the last one 8/8")
    return Share(int(match[1]) - 1, int(match[2]))


def wait_until(there: Callable[[], bool], what: str, progress: Progress) -> None:
    """Returns when `there` does; says now and then what is waited for."""
    said = float("-inf")
    while not there():
        if time.monotonic() >= said + _REMIND_SECONDS:
            said = time.monotonic()
            progress(f"waiting for {what}")
        time.sleep(POLL_SECONDS)
