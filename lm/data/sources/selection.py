"""Which records are documents, and what their text is."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lm.data.tokenizers import valid_text
from lm.errors import ConfigError

Filter = Callable[[dict[str, Any]], bool]


def load_filter(name: str | None) -> Filter | None:
    """The function that `data.filter` names, as package.module:function.

    Raises:
        ConfigError: it cannot be imported.
    """
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # of the import itself, or of whatever the module does when imported
        raise ConfigError(
            f"data.filter: {name}: {error!r}; write package.module:function, of a module that Python finds "
            "(installed, or in a folder that PYTHONPATH names)"
        ) from None
    if not callable(found):
        raise ConfigError(f"data.filter: {name}: a {type(found).__name__}, not a function")
    return found


@dataclass(frozen=True)
class Selection:
    """What `data` says of records. `skipped` counts what is left out: "filtered" or "empty"."""

    text_field: str
    skipped: Counter[str]
    keep: Filter | None = None
    """Called with all fields of a record, or with {"text": text} where it has none."""

    def text(self, record: dict[str, Any]) -> str | None:
        """The text of the record, None if it is left out. Raises ValueError if there is none."""
        if self.keep is not None and not self._keeps(self.keep, record):
            return None
        field = self.text_field
        if field not in record:
            raise ValueError(no_field(field, record))
        text = record[field]
        if not isinstance(text, str):
            raise ValueError(f"field {field!r} holds a {type(text).__name__}, not a text")
        if not text:
            self.skipped["empty"] += 1
            return None
        return valid_text(text)

    def plain(self, text: str) -> str | None:
        """A text that has no fields, None if it is left out. Raises ValueError if the filter fails."""
        if self.keep is not None and not self._keeps(self.keep, {"text": text}):
            return None
        if not text:
            self.skipped["empty"] += 1
            return None
        return text

    def _keeps(self, keep: Filter, record: dict[str, Any]) -> bool:
        try:
            kept = keep(record)
        except Exception as error:
            raise ValueError(f"data.filter failed: {error!r}") from None
        if not isinstance(kept, bool):
            raise ValueError(f"data.filter gave {kept!r} instead of True or False")
        if not kept:
            self.skipped["filtered"] += 1
        return kept


def no_field(field: str, there: Iterable[str]) -> str:
    return f"no field {field!r}; set data.text_field to one of: {', '.join(there)}"
