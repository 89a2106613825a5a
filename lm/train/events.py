"""Event files of TensorBoard: what stands in them, written without TensorFlow, and taken out again after a step."""

import io
import os
import socket
import struct
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from etils import epath
from google.protobuf.message import DecodeError
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.histogram import metadata as histogram_plugin
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.text import summary_v2 as text_plugin
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util import tensor_util

from lm.files import AppendOnlyFile


class EventFile:
    """One more event file in `folder`, read by TensorBoard after those that are there."""

    def __init__(self, folder: epath.Path, report: Callable[[str], None]):
        earlier = list(folder.glob(PATTERN))
        self._file = AppendOnlyFile(folder / _name(earlier), report)
        self._records = RecordWriter(SimpleNamespace(write=self._file.append))
        self.add(step=0, file_version="brain.Event:2")

    def add(self, **fields: Any) -> None:
        """One `Event`, in one write."""
        self._records.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        self._file.close()


PATTERN = "events.out.tfevents.*"


def text(tag: str, markdown: str) -> summary_pb2.Summary:
    found: summary_pb2.Summary = text_plugin.text_pb(tag, markdown.encode(errors="replace").decode())
    return found


def image(tag: str, pixels: Image.Image) -> summary_pb2.Summary:
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG", optimize=True)
    words = [str(pixels.width).encode(), str(pixels.height).encode(), buffer.getvalue()]
    return _tensor(
        tag,
        image_plugin.create_summary_metadata(display_name=None, description="", converted_to_tensor=True),
        np.array(words, dtype=object),
    )


def histogram(tag: str, bins: np.ndarray) -> summary_pb2.Summary:
    """bins: [n, 3], left and right edges, counts."""
    metadata = histogram_plugin.create_summary_metadata(display_name=None, description="")
    return _tensor(tag, metadata, bins.astype(np.float64))


def _tensor(tag: str, metadata: Any, values: np.ndarray) -> summary_pb2.Summary:
    summary = summary_pb2.Summary()
    summary.value.add(tag=tag, metadata=metadata, tensor=tensor_util.make_tensor_proto(values))
    return summary


def events_before(contents: bytes, step: int) -> bytes:
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


def _name(earlier: Sequence[epath.Path]) -> str:
    """TensorBoard reads event files in the order of their names, which begin with a time.

    That time must grow even when the clock does not: two starts in one second, or a clock set back.
    """
    times = [file.name.split(".")[3] for file in earlier]
    begin = max([int(time.time())] + [int(number) + 1 for number in times if number.isdecimal()])
    return f"events.out.tfevents.{begin:010d}.{socket.gethostname()}.{os.getpid()}"
