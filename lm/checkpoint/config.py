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
    patience_seconds: float = 0.0
    """How long training waits with a save for the one before, where that is still going. Then it goes on, and the save
    is made up for at a later step."""
    give_up_seconds: float = 6 * 3600.0
    """Time for which saves may fail, or go on, before the run ends with exit code 5; 0: for ever."""
    local_dir: str = ""
    """A folder of each host, in memory (/dev/shm/lm) or on a disk, for checkpoints that a restart on the same hosts
    goes on from. Runs may share it. Empty: none."""
    local_seconds: float = 300.0
    """From one of these to the next."""
    local_keep: int = 2
    """How many of them there is room for at most, the one that is being written among them."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name in ("every", "keep_every"):
            if getattr(self, name) < 0:
                yield name, f"must be at least 0, got {getattr(self, name)}"
        if self.keep_last < 1:
            yield "keep_last", f"must be at least 1, got {self.keep_last}"
        if "://" in self.local_dir:
            yield "local_dir", f"must be a folder of each host, such as /dev/shm/lm, got {self.local_dir}"
        if not 0 < self.local_seconds < float("inf"):
            yield "local_seconds", f"must be a number above 0, got {self.local_seconds}"
        if self.local_keep < 2:
            yield "local_keep", f"must be at least 2, a whole one and the next; got {self.local_keep}"
        for name in ("patience_seconds", "give_up_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                yield name, f"must be a number of at least 0, got {getattr(self, name)}"
