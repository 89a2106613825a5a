"""What a run logs: `metrics.jsonl` for programs, TensorBoard event files for people.

Event files (TFRecords of `Event` protos) are written with tensorboard's own record writer, without
TensorFlow. Both files get each step in one write call, without a buffer or a thread: it is in the kernel's
hands when the call returns, so a killed run loses nothing, and TensorBoard shows it at once.
"""

import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from google.protobuf.message import DecodeError
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.text import summary_v2 as text_plugin
from tensorboard.summary.writer.record_writer import RecordWriter

from lm.errors import StorageError
from lm.files import AppendOnlyFile, reason
from lm.train.run_directory import RunDirectory

# Name in metrics.jsonl -> tag in TensorBoard, which shows one section for each first part, by alphabet.
# A name that is not here is shown as it is if it has a "/", else under other/.
TAGS = {
    "loss": "train/loss",
    "bits_per_byte": "train/bits_per_byte",
    "tokens": "train/tokens",
    "skipped_steps": "train/skipped_steps",
    "rewinds": "train/rewinds",
    "batches_left_out": "train/batches_left_out",
    "heldout_loss": "heldout/loss",
    "heldout_bits_per_byte": "heldout/bits_per_byte",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "param_norm": "optimizer/param_norm",
    "update_norm": "optimizer/update_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "model_flops_per_second": "speed/model_flops_per_second",
    "mfu": "speed/mfu",
    "step_seconds": "speed/step_seconds",
    "expected_step_seconds": "speed/expected_step_seconds",
    "input_wait_seconds": "speed/input_wait_seconds",
    "saves": "checkpoint/saves",
    "saves_failed": "checkpoint/failed",
    "saves_skipped": "checkpoint/skipped",
    "save_blocked_seconds": "checkpoint/blocked_seconds",
    "save_seconds": "checkpoint/seconds",
    "checkpoint_age_seconds": "checkpoint/age_seconds",
    "memory_bytes": "memory/bytes",
    "expected_memory_bytes": "memory/expected_bytes",
}


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
        earlier = list(run.tensorboard.glob("events.out.tfevents.*"))
        _cut(run.metrics, _lines_before, self._begin, report)
        for file in earlier:
            _cut(file, _events_before, self._begin, report)
        self._metrics = AppendOnlyFile(run.metrics, report)
        self._events = AppendOnlyFile(run.tensorboard / _event_file_name(earlier), report)
        self._records = RecordWriter(_Records(self._events))
        self._add_event(step=0, file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add_event(step=self._begin, session_log=start)

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
        plain = {name: _plain(value) for name, value in values.items()}
        line = {"step": int(step)} | {name: _json_number(value) for name, value in plain.items()}
        self._metrics.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._add_scalars(step, plain)

    def amend_last(self, step: int, values: Mapping[str, float]) -> None:
        """Adds values to the line of `step`, the last one; where that line is missing, they become it.

        TensorBoard shows them at the step after it, so a start that goes on after `step` can log them anew.

        Raises:
          ValueError: a later step is logged, or is finished.
        """
        if step < self._next_step - 1:
            raise ValueError(f"step {step} is not the last: the next can be {self._next_step}")
        self._next_step = step + 1
        extra = {name: _json_number(_plain(value)) for name, value in values.items()}

        def amended(line: bytes) -> bytes:
            of_step = _step_of(line) == step
            kept, fields = (b"", json.loads(line)) if of_step else (line, {"step": int(step)})
            return kept + json.dumps(fields | extra, allow_nan=False).encode() + b"\n"

        self._metrics.replace_last(amended)
        self._add_scalars(step + 1, values)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """Shows a text in TensorBoard, rendered as markdown: see `verbatim` for text that is not."""
        utf8 = markdown.encode(errors="replace").decode()
        self._add_event(step=step, summary=text_plugin.text_pb(tag, utf8))

    def config(self, resolved: str) -> None:
        """Shows the config that this start of the run uses, as it is saved in config.json."""
        self.text(self._begin, "config", verbatim(resolved))

    def close(self) -> None:
        self._metrics.close()
        self._events.close()

    def _add_scalars(self, step: int, values: Mapping[str, float | int]) -> None:
        summary = summary_pb2.Summary()
        for name, value in values.items():
            # 20 times cheaper to build than the tensor form, which TensorBoard makes of it when it reads.
            summary.value.add(tag=_tag(name), simple_value=value)
        self._add_event(step=step, summary=summary)

    def _add_event(self, **fields: Any) -> None:
        self._records.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())


class NoSummaries:
    """In place of `Summaries` in a process that does not log: takes everything, writes nothing."""

    def scalars(self, step: int, values: Mapping[str, float | int]) -> None: ...

    def amend_last(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, tag: str, markdown: str) -> None: ...

    def config(self, resolved: str) -> None: ...

    def close(self) -> None: ...


def verbatim(text: str) -> str:
    """Markdown that shows `text` as it is: line by line, with nothing in it read as markup."""
    return "\n".join("    " + line for line in text.splitlines())


class _Records:
    """The part of a file that RecordWriter needs."""

    def __init__(self, file: AppendOnlyFile):
        self.write = file.append


def _tag(name: str) -> str:
    return TAGS.get(name, name if "/" in name else f"other/{name}")


def _plain(value: Any) -> float | int:
    return value.item() if hasattr(value, "item") else value


def _json_number(value: float | int) -> float | int | str:
    if isinstance(value, int) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


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


def _events_before(contents: bytes, step: int) -> bytes:
    """The events before `step` (they need not be in order), up to a record that is torn or damaged.

    A record is its length (8 bytes), a checksum (4), an `Event`, and a checksum (4). TensorBoard reads nothing
    after a damaged one. The second checksum is not computed here: in Python that takes minutes for a long run.
    """
    kept = []
    position = 0
    while position + 12 <= len(contents):
        length, checksum = struct.unpack_from("<QI", contents, position)
        end = position + 12 + length + 4
        if end > len(contents) or checksum != masked_crc32c(contents[position : position + 8]):
            break
        try:
            event = event_pb2.Event.FromString(contents[position + 12 : end - 4])
        except DecodeError:
            break
        if event.step < step or event.HasField("file_version"):
            kept.append(contents[position:end])
        position = end
    return b"".join(kept)


def _step_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _event_file_name(earlier: Sequence[epath.Path]) -> str:
    """TensorBoard reads event files in the order of their names, which begin with a time.

    That time must grow even when the clock does not: two starts in one second, or a clock set back.
    """
    times = [file.name.split(".")[3] for file in earlier]
    begin = max([int(time.time())] + [int(number) + 1 for number in times if number.isdecimal()])
    return f"events.out.tfevents.{begin:010d}.{socket.gethostname()}.{os.getpid()}"
