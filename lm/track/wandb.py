"""Weights & Biases. Where, is told to its library: WANDB_API_KEY, WANDB_BASE_URL, WANDB_ENTITY, WANDB_MODE and the
like; WANDB_PROJECT, or lm.

Its steps only grow: when a run goes on, the service says how far it has come. Of steps that are done again after a
rewind it keeps the first values.
"""

import os
import time
import traceback
from collections.abc import Sequence
from typing import Any

from lm.errors import StorageError
from lm.track.tracker import State, TrackedRun
from lm.train.metrics import Line, Mark

ASK_SECONDS = 60.0
"""Between two questions to the service about what it has."""
STALL_SECONDS = 900.0
"""For so long it may have nothing new; the library gives up without a word."""
SETTLE_SECONDS = 10.0
"""In which it knows what it was sent."""
_CODES = {"finished": 0, "failed": 1, "stopped": 75}


class WandbTracker:
    url: str | None = None

    def __init__(self) -> None:
        self._last: Mark | None = None

    def begin(self, run: TrackedRun) -> Mark | None:
        import wandb

        if run.folder is not None:
            os.environ.setdefault("WANDB_DIR", run.folder)
        settings: dict[str, Any] = {
            "console": "off",
            "disable_code": True,
            "disable_git": True,
            "x_disable_stats": True,  # they would be of the process that sends
            "x_disable_meta": True,
            "host": run.facts.get("host"),
            "git_commit": run.facts.get("commit"),
        }
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "lm",
            id=run.id,
            name=os.environ.get("WANDB_NAME") or run.name,
            resume="allow",
            settings=wandb.Settings(**{name: value for name, value in settings.items() if value is not None}),
        )
        self._run.config.update(dict(run.config) | {"lm": dict(run.facts)}, allow_val_change=True)
        self._online = not (self._run.offline or self._run.disabled)
        self._step = self._run.starting_step - 1
        self._received = self._step
        self._moved = self._asked = time.monotonic()
        if not self._online:
            return None
        self.url = self._run.url
        return Mark(0, self._step)

    def scalars(self, lines: Sequence[Line]) -> None:
        if self._received == self._step:
            self._moved = time.monotonic()
        for line in lines:
            if line.step > self._step:
                self._run.log(dict(line.values), step=line.step, commit=True)
                self._step = line.step
            self._last = line.mark

    def received(self) -> Mark | None:
        now = time.monotonic()
        if self._received < self._step and self._online and now - self._asked >= ASK_SECONDS and self._ask():
            silent = now - self._moved
            if self._received < self._step and silent >= STALL_SECONDS:
                raise StorageError(f"it has nothing after step {self._received}, for {silent:.0f} s")
        if self._received >= self._step or not self._online:
            return self._last
        return Mark(self._last.rewinds, self._received) if self._last else None

    def finish(self, state: State) -> None:
        if state == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=_CODES[state])
        until = time.monotonic() + SETTLE_SECONDS
        while self._online and self._received < self._step and self._ask():  # what it refused, the library only prints
            if self._received < self._step:
                if time.monotonic() > until:
                    raise StorageError(f"it has nothing after step {self._received}")
                time.sleep(1)

    def _ask(self) -> bool:
        """Asks the service which step it has; whether it answered."""
        import wandb

        self._asked = time.monotonic()
        try:
            path = f"{self._run.entity}/{self._run.project}/{self._run.id}"
            step = wandb.Api(timeout=20).run(path).lastHistoryStep
        except Exception:
            traceback.print_exc()
            return False
        if step > self._received:
            self._received, self._moved = step, self._asked
        return True
