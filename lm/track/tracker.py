"""What a tracker is to the rest of lm: a service that shows the metrics of runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from lm.train.metrics import Line, Mark

State = Literal["finished", "failed", "stopped"]


@dataclasses.dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run."""

    id: str
    """That of the run's first start: the same for all that goes on with it."""
    name: str
    config: Mapping[str, Any]
    """As it stands in config.json."""
    facts: Mapping[str, str]
    """`host`, where it was started last, and `commit` of the code, if known."""
    folder: str | None
    """For files of the tracker's library; None: wherever it puts them."""


class Tracker(Protocol):
    """One tracked run. What cannot be done raises whatever the library does; then the tracker is of no more use."""

    url: str | None
    """Where it can be seen."""

    def begin(self, run: TrackedRun) -> Mark | None:
        """Begins it, or goes on with it; the newest line that is there, None when the tracker cannot tell."""

    def scalars(self, lines: Sequence[Line]) -> None:
        """Sends lines, oldest first, all of them later than what is there."""

    def received(self) -> Mark | None:
        """The newest line that is known to be there, as far as that is known without waiting for long."""

    def finish(self, state: State) -> None:
        """Returns when all is there."""


def open_tracker(name: str) -> Tracker:
    """The tracker of this name, one of lm.train.config.TRACKERS."""
    if name == "wandb":
        from lm.track.wandb import WandbTracker

        return WandbTracker()
    from lm.track.mlflow import MlflowTracker

    return MlflowTracker()
