"""`lm runs DIR…`: the runs below folders, side by side, with what differs in their configs."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from typing import Any

from etils import epath

from lm.config import flat
from lm.errors import ConfigError, LmError, StorageError
from lm.files import reason
from lm.report.facts import Facts, one_line, read_facts
from lm.train.metrics import plain
from lm.train.progress import human_count, human_seconds

READERS = 16
"""Runs that are read at once: with a bucket, most of the time is waiting."""

HEADS = {
    "run": "run",
    "state": "state",
    "step": "step",
    "tokens": "tokens",
    "loss": "loss",
    "heldout_bits_per_byte": "held-out b/B",
    "tokens_per_second": "tokens/s",
    "mfu": "MFU",
    "wall_seconds": "time",
}
"""Columns of the table, by their names in what `compared` gives; `steps` is shown with `step`."""


def find_runs(folder: str | os.PathLike[str]) -> list[epath.Path]:
    """The runs in this folder and below, by name; the folder itself if it is one. Raises ConfigError when there is no
    such folder, StorageError when it cannot be listed."""
    root = epath.Path(folder)
    try:
        if not root.is_dir():
            raise ConfigError(f"{one_line(root)} is no folder")
        return sorted(_below(root, set()))
    except ConfigError:
        raise
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot list {one_line(root)}: {reason(error)}") from error


def compare(
    folders: Sequence[str], sort: str | None, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """A row for each run below the folders: `steps` and what HEADS names, as plain values (see `plain`); and `config`,
    the values by dotted key that are not the same in all of them, of those that the run has.

    `sort` is one of these names, or a key of `config` or its last part; smallest first, runs without it last. Runs that
    cannot be read are told to `say`.

    Raises:
      ConfigError: no runs, or nothing to sort by that is called so.
      StorageError: none can be read.
    """
    paths = list(dict.fromkeys(path for folder in folders for path in find_runs(folder)))
    if not paths:
        raise ConfigError(f"no runs in {one_line(', '.join(folders))}: a run is a folder with a config.json")
    with ThreadPoolExecutor(READERS) as pool:
        read = list(pool.map(_facts_or_problem, paths))
    found = [one for one in read if isinstance(one, Facts)]
    problems = [one for one in read if not isinstance(one, Facts)]
    if not found:
        raise problems[0]
    for problem in problems:
        say(str(problem))
    differing = differences([facts.config for facts in found])
    rows = [{**_row(facts), "config": config} for facts, config in zip(found, differing, strict=True)]
    return rows if sort is None else _sorted(rows, sort)


def differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each config, the values by dotted key that differ between them, but for where the run is.

    A key that a config lacks because older code wrote it is no difference; one in a section or a list that is not there
    is.
    """
    keys = dict.fromkeys(key for config in configs for key in flat(config) if key != "run.dir")
    found: list[dict[str, Any]] = [{} for _ in configs]
    for key in keys:
        values = [_lookup(config, key) for config in configs]
        # What is not there differs from a value, but not from nothing.
        known = {json.dumps(None if value in _NOTHING else value) for value in values if value is not _UNKNOWN}
        if len(known) > 1:
            for row, value in zip(found, values, strict=True):
                if value is not _ABSENT and value is not _UNKNOWN:
                    row[key] = value
    return found


def table(rows: Sequence[Mapping[str, Any]], width: int | None) -> Iterator[str]:
    """Lines. Columns of configs that do not fit the width are only named."""
    keys = list(dict.fromkeys(key for row in rows for key in row["config"]))
    columns = [[HEADS[name], *(_cell(row, name) for row in rows)] for name in HEADS]
    columns = [column for column in columns if any(column[1:])]
    columns += [[head, *(_spelled(row["config"].get(key, "")) for row in rows)] for key, head in _heads(keys)]
    fixed = len(columns) - len(keys)
    widths = [max(map(len, column)) for column in columns]
    shown = len(columns)
    while width is not None and shown > fixed and sum(widths[:shown]) + 2 * (shown - 1) > width:
        shown -= 1
    for cells in zip(*columns[:shown], strict=True):
        texts, numbers = zip(cells[:2], widths[:2], strict=True), zip(cells[2:], widths[2:shown], strict=True)
        parts = [cell.ljust(size) for cell, size in texts] + [cell.rjust(size) for cell, size in numbers]
        yield "  ".join(parts).rstrip()
    if left := keys[shown - fixed :]:
        yield f"too wide for this terminal: {', '.join(one_line(key) for key in left)}; --json has them"


def _facts_or_problem(path: epath.Path) -> Facts | LmError:
    try:
        return read_facts(path)
    except LmError as error:
        return error
    except Exception as error:  # as when it was removed meanwhile
        return StorageError(f"{one_line(path)} cannot be read: {reason(error)}")


def _below(folder: epath.Path, seen: set[str]) -> Iterator[epath.Path]:
    """A run is not looked into: its checkpoints have a config.json too."""
    inside = {path.name: path for path in folder.iterdir()}
    if _is_run(inside):
        yield folder
        return
    seen.add(os.path.realpath(folder))
    for name, path in inside.items():
        # A link may lead back to where it is.
        if not name.startswith(".") and path.is_dir() and os.path.realpath(path) not in seen:
            with contextlib.suppress(PermissionError):  # of a folder that is somebody else's
                yield from _below(path, seen)


def _is_run(inside: Mapping[str, epath.Path]) -> bool:
    """Other things have a config.json too, such as models of Hugging Face."""
    if "journal.jsonl" in inside:
        return True
    if "config.json" not in inside:
        return False
    try:
        return {"run", "train"} <= json.loads(inside["config.json"].read_bytes()).keys()
    except (ValueError, AttributeError, IsADirectoryError):
        return False


def _row(facts: Facts) -> dict[str, Any]:
    heldout = facts.heldout.values if facts.heldout else {}
    values = {
        "run": str(facts.directory.path),
        "state": facts.state,
        "step": facts.done,
        "steps": facts.steps,
        "tokens": facts.value("tokens"),
        "loss": facts.value("loss"),
        "heldout_bits_per_byte": heldout.get("heldout_bits_per_byte"),
        "tokens_per_second": facts.median("tokens_per_second"),
        "mfu": facts.median("mfu"),
        "wall_seconds": facts.wall_seconds,
    }
    return {name: plain(value) for name, value in values.items()}


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return ""
    if name == "step":
        return f"{value:,}/{row['steps']:,}" if row["steps"] else f"{value:,}"
    if name in ("tokens", "tokens_per_second"):
        return human_count(float(value))
    if name == "wall_seconds":
        return human_seconds(value)
    if name == "mfu":
        return f"{float(value):.1%}"
    return f"{float(value):.4f}" if name in ("loss", "heldout_bits_per_byte") else one_line(value)


def _spelled(value: Any) -> str:
    nested = isinstance(value, list) and any(isinstance(item, list) for item in value)
    text = json.dumps(value) if nested else ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return one_line(text if len(text) <= 40 else f"{text[:18]}…{text[-20:]}")


def _heads(keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """With each key its last part, where that is clear."""
    ends = [key.rpartition(".")[2] for key in keys]
    for key, end in zip(keys, ends, strict=True):
        yield key, one_line(end if ends.count(end) == 1 and not end.isdecimal() else key)


def _sorted(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for row in rows for key in row["config"])
    by_end = {key.rpartition(".")[2]: key for key in keys} | {head: name for name, head in HEADS.items()}
    known = [*rows[0].keys() - {"config"}, *keys]
    chosen = name if name in known else by_end.get(name)
    if chosen is None:
        near = get_close_matches(name, [*known, *by_end], n=1)
        raise ConfigError(
            f"nothing to sort by is called {one_line(name)!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(map(one_line, known))}")
        )

    def order(row: dict[str, Any]) -> tuple[int, float, str]:
        value = row[chosen] if chosen in row else row["config"].get(chosen)
        if value is None:
            return 3, 0.0, ""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return 1, 0.0, str(value)
        return (2, 0.0, "") if math.isnan(number) else (0, number, "")

    return sorted(rows, key=order)


def _lookup(config: Any, key: str) -> Any:
    value = config
    for part in key.split("."):
        if isinstance(value, Mapping):
            if part not in value:
                return _UNKNOWN
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value if "" in flat(value) else _ABSENT  # a section


_ABSENT, _UNKNOWN = object(), object()
"""Of a key: there is none because a section or an element is not there; or because older code did not have it."""
_NOTHING: tuple[Any, ...] = (_ABSENT, None, "", [])
