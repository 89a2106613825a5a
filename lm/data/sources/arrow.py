"""A row of an Arrow stream is a document; a piece is the record batches that begin in it.

This is what Hugging Face's library keeps datasets in. A dataset that it saved is a folder of such files and of two
that describe them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from lm.data.remote import opened
from lm.data.sources import columns
from lm.data.sources.selection import Selection
from lm.data.sources.stored import Document, File, Hash, Piece, cut_at, stored_blocks, whole
from lm.errors import DataError
from lm.files import is_url

_END = b"\xff\xff\xff\xff\0\0\0\0"
DESCRIPTIONS = {"state.json", "dataset_info.json"}
_DICTIONARY = "dataset_dict.json"


def saved_files(folder: str, names: list[str]) -> list[str]:
    """Those of the names in the folder that hold text: all, or what a saved dataset says if this is one.

    Raises:
        DataError: a saved dataset that does not say which its files are.
    """
    if not DESCRIPTIONS.issubset(names):
        return [name for name in names if name != _DICTIONARY]  # the latter names the folders of the splits
    state = f"{folder}/state.json"
    try:
        with opened(state) as file:
            names = [entry["filename"] for entry in json.load(file)["_data_files"]]
        if outside := [name for name in names if "/" in name]:
            raise ValueError(f"{outside[0]!r} is no name of a file in it")
        return names
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state}: not of a saved dataset: {error!r}") from None


def cut(file: File, limit: int) -> list[Piece]:
    if is_url(file.path):  # finding where batches begin would read all of it
        return [whole(file)]
    with _opened(file) as (source, reader):
        return cut_at(file, (start for start, _ in _batches(file, source, reader)), limit)


def documents(piece: Piece, selection: Selection, digest: Hash | None) -> Iterator[Document]:
    with _opened(piece.file) as (source, reader):
        yield from columns.documents(piece.file.name, reader.schema.names, _numbered(piece, source, reader), selection)
    if digest is not None:
        for _ in stored_blocks(piece, digest):
            pass


@contextlib.contextmanager
def _opened(file: File) -> Iterator[tuple[Any, Any]]:
    """The file and a reader of it, which touches only what is used of a local file."""
    lib, ipc = (columns.pyarrow(module, file.name) for module in ("lib", "ipc"))
    with columns.reading(file.name, "Arrow stream"), contextlib.ExitStack() as stack:
        if is_url(file.path):
            source = lib.PythonFile(stack.enter_context(opened(file.path, file.size)), "r")
        else:
            source = stack.enter_context(lib.memory_map(file.path))
        yield source, stack.enter_context(ipc.open_stream(source))


def _batches(file: File, source: Any, reader: Any) -> Iterator[tuple[int, Any]]:
    """(offset of its first byte, batch). Raises DataError if the file ends without the mark of the end."""
    while True:
        start = source.tell()
        try:
            yield start, reader.read_next_batch()
        except StopIteration:
            break
    source.seek(max(0, file.size - len(_END)))
    if source.read() != _END:
        raise DataError(f"{file.name}: the Arrow stream has no end; the file seems truncated")


def _numbered(piece: Piece, source: Any, reader: Any) -> Iterator[tuple[int, Any]]:
    row = 0
    for start, batch in _batches(piece.file, source, reader):
        if piece.start <= start < piece.stop:
            yield row, batch
        row += batch.num_rows
