"""What a run logs: `metrics.jsonl` for programs, TensorBoard event files for people.

Both files get each step in one write call, without a buffer or a thread: it is in the kernel's hands when the call
returns, so a killed run loses nothing, and TensorBoard shows it at once.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath
from tensorboard.compat.proto import event_pb2, summary_pb2

from lm import config as configs
from lm.errors import StorageError
from lm.experiment import Config
from lm.files import AppendOnlyFile, reason
from lm.train import dashboard, events
from lm.train.metrics import parsed, plain
from lm.train.run_directory import RunDirectory


class Summaries:
    """Writes the logged values of a run that starts, or goes on, after `first_step` finished steps.

    What an earlier start of the run logged beyond `first_step` is undone, as those steps are run again:
    it is taken out of metrics.jsonl and the event files, and a TensorBoard that has it in memory is told to
    forget it. Steps are counted from 0: `first_step` is the first that can be logged now.

    Once training goes on, failing storage never raises: it is told to `report` once per file.

    Raises:
      StorageError: what earlier starts logged cannot be read.
    """

    def __init__(self, run: RunDirectory, *, first_step: int, report: Callable[[str], None]):
        self._begin = self._next_step = first_step
        _cut(run.metrics, _lines_before, self._begin, report)
        for file in run.tensorboard.glob(events.PATTERN):
            _cut(file, events.events_before, self._begin, report)
        self._name = run.path.name
        self._metrics = AppendOnlyFile(run.metrics, report)
        self._events = events.EventFile(run.tensorboard, report)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.add(step=self._begin, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        """Logs everything known of one step: one call, and so one line of metrics.jsonl, per step.

        Numbers (NumPy and JAX scalars too) are written so that they read back exactly: a float32 as the
        double of equal value. JSON has no words for non-finite numbers; they are the strings "NaN",
        "Infinity" and "-Infinity", which Python's `float` and pandas read. TensorBoard gets float32.

        Raises:
          ValueError: `step` is not later than the last one logged.
        """
        if step < self._next_step:
            raise ValueError(f"step {step} is logged already: the next can be {self._next_step}")
        self._next_step = step + 1
        numbers = {name: _number(value) for name, value in values.items()}
        line = {"step": int(step)} | {name: plain(value) for name, value in numbers.items()}
        self._metrics.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._add_scalars(step, numbers)

    def amend_last(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values to the line of `step`, the last one; where that line is missing, they become it.

        TensorBoard shows them at the step after it, so a start that goes on after `step` can log them anew.

        Raises:
          ValueError: a later step is logged, or is finished.
        """
        if step < self._next_step - 1:
            raise ValueError(f"step {step} is not the last: the next can be {self._next_step}")
        self._next_step = step + 1
        extra = {name: plain(_number(value)) for name, value in values.items()}

        def amended(line: bytes) -> bytes:
            of_step = _step_of(line) == step
            kept, fields = (b"", json.loads(line)) if of_step else (line, {"step": int(step)})
            return kept + json.dumps(fields | extra, allow_nan=False).encode() + b"\n"

        self._metrics.replace_last(amended)
        self._add_scalars(step + 1, values)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Shows a text in TensorBoard, rendered as markdown: see `verbatim` for text that is not."""
        self.show(step, events.text(tag, markdown))

    def show(self, step: int, summary: summary_pb2.Summary) -> None:
        """Shows in TensorBoard what lm/train/events.py makes: an image, a histogram."""
        self._events.add(step=step, summary=summary)

    def config(self, config: Config, run: str) -> None:
        """Shows the config that this start of the `run`, an id, uses, how it compares with others, and the page of
        charts."""
        self.text(self._begin, "config", verbatim(configs.to_json(config)))
        # They count for the whole run: only the first is read.
        for summary in (dashboard.layout(), *dashboard.compared(configs.leaves(config), f"{self._name} {run[:6]}")):
            self.show(0, summary)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()

    def _add_scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        summary = summary_pb2.Summary()
        for name, value in values.items():
            # 20 times cheaper to build than the tensor form, which TensorBoard makes of it when it reads.
            summary.value.add(tag=dashboard.tag(name), simple_value=value)
        self.show(step, summary)


class NoSummaries:
    """In place of `Summaries` in a process that does not log: takes everything, writes nothing."""

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None: ...

    def amend_last(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, tag: str, markdown: str) -> None: ...

    def show(self, step: int, summary: summary_pb2.Summary) -> None: ...

    def config(self, config: Config, run: str) -> None: ...

    def close(self) -> None: ...


def verbatim(text: str) -> str:
    """Markdown that shows `text` as it is: line by line, with nothing in it read as markup."""
    return "\n".join("    " + line for line in text.splitlines())


def _number(value: Any) -> float | int:
    return value.item() if hasattr(value, "item") else value


def _cut(
    path: epath.Path,
    before: Callable[[bytes, int], bytes],
    step: int,
    report: Callable[[str], None],
) -> None:
    try:
        contents = path.read_bytes() if path.exists() else b""
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot read what the run logged before, in {path}: {reason(error)}") from error
    kept = before(contents, step)
    if kept != contents:
        file = AppendOnlyFile(path, report)
        if contents.startswith(kept):  # needs no space, so it works on a full disk
            file.truncate(len(kept))
        else:
            file.replace(kept)
        file.close()


def _lines_before(contents: bytes, step: int) -> bytes:
    """All up to the first line of `step` or later, or to a tail torn by a crash."""
    position = size = 0
    for line in contents.splitlines(keepends=True):
        position += len(line)
        logged = _step_of(line)
        if logged is not None and logged >= step:
            break
        if logged is not None:  # a line that cannot be read stays if a good one follows
            size = position
    return contents[:size]


def _step_of(line: bytes) -> int | None:
    found = parsed(line) if line.endswith(b"\n") else None
    return found.step if found else None
