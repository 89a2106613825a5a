"""Rows of Arrow tables as documents, for the formats that pyarrow reads."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from lm.data.sources.selection import Selection, no_field
from lm.data.sources.stored import Document
from lm.errors import DataError

_ROWS = 128  # that become Python objects at once


def pyarrow(module: str, name: str) -> Any:
    """`pyarrow.module`. Raises DataError if it is not installed."""
    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError:
        raise DataError(f"{name}: reading it needs pyarrow: pip install 'lm[parquet]'") from None


@contextlib.contextmanager
def reading(name: str, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises into DataError."""
    try:
        yield
    except (OSError, pyarrow("lib", name).ArrowException) as error:
        raise DataError(f"{name}: broken {kind}, or none: {error}") from None


def documents(
    name: str, columns: list[str], batches: Iterable[tuple[int, Any]], selection: Selection
) -> Iterator[Document]:
    """The documents of (number of the first row, pyarrow.RecordBatch). A row without a value for the text is empty."""
    field = selection.text_field
    if field and field not in columns:  # without a name, the filter is given all and keeps none
        raise DataError(f"{name}: {no_field(field, columns)}")
    if columns.count(field) > 1:
        raise DataError(f"{name}: has {columns.count(field)} columns {field!r}; give each a name of its own")
    for first, batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            rows = batch.slice(start, _ROWS)
            for number, record in enumerate(_records(rows, selection, name, first + start), first + start):
                where = f"{name}: row {number}"
                if field and record[field] is None:
                    record[field] = ""
                try:
                    text = selection.text(record)
                except ValueError as error:
                    raise DataError(f"{where}: {error}") from None
                if text:
                    yield Document(where, text, text.encode())


def _records(rows: Any, selection: Selection, name: str, first: int) -> list[dict[str, Any]]:
    wanted = rows if selection.keep else rows.select([selection.text_field])
    invalid = pyarrow("lib", name).ArrowInvalid
    try:
        wanted.validate(full=True)  # damaged offsets would make Python read anything, or crash
    except invalid:
        for number in range(wanted.num_rows):
            try:
                wanted.slice(number, 1).validate(full=True)
            except invalid as error:
                raise DataError(f"{name}: row {first + number}: {error}") from None
        raise
    return wanted.to_pylist()
