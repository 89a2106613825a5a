"""When the state of a run is saved, and which saves are kept."""

import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which saves are kept."""

    every: int = 500
    """Steps from save to save; 0: only at the end and when stopped."""
    keep_last: int = 2
    """The newest ones kept."""
    keep_every: int = 0
    """Those at multiples of this many steps are kept for good; 0: none."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.every < 0:
            yield "every", f"must be at least 0, got {self.every}"
        if self.keep_last < 1:
            yield "keep_last", f"must be at least 1, got {self.keep_last}"
        if self.keep_every < 0:
            yield "keep_every", f"must be at least 0, got {self.keep_every}"
