"""What a data directory is built from, so that a build can be continued, or refused when it changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from etils import epath

from lm.data import sources
from lm.data.config import DataConfig
from lm.data.records import FORMAT
from lm.data.sources import File, Piece
from lm.errors import DataError, some

PLAN = "plan.json"
PART_FILES = "part-*.json"

MIN_PART_BYTES = 4 << 20
MAX_PART_BYTES = 64 << 20
MAX_PARTS = 16384  # parts get larger instead: of each there is a line in the manifest, and a file or two

# What says where files are, or what is made of them when they are read; as all does that is free in a config.
_AFTERWARDS = ("paths", "sources", "mixture", "packing", "attention", "prefix_rate")

# Settings that older plans lack. Written only where they are given, so that other plans stay as they were.
_LATER = (
    "filter",
    "tokens",
    "separator",
    "duplicates",
    "near_similarity",
    "overlap",
    "overlap_paths",
    "fim_rate",
    "fim_tokens",
)


@dataclass(frozen=True)
class Plan:
    """What is built: everything that decides the result. Documents with smaller hashes are held out."""

    paths: tuple[str, ...]
    settings: dict[str, Any]
    part_bytes: int
    parts: list[list[Piece]]
    holdout_below: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "paths": list(self.paths),
            "settings": self.settings,
            "part_bytes": self.part_bytes,
            "holdout_below": self.holdout_below,
            "files": {f.name: [f.size, f.modified, f.heldout] for f in self.files().values()},
        }

    @property
    def identity(self) -> str:
        """The same for the same settings and files, wherever they are and whenever they were put there."""
        content = self.to_dict()
        del content["paths"]
        content["files"] = {name: [size, heldout] for name, (size, _, heldout) in content["files"].items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def files(self) -> dict[str, File]:
        return {piece.file.name: piece.file for part in self.parts for piece in part}


def part_bytes(listed: list[File]) -> int:
    """The size of parts: enough of them for several processes, not so many that shards get tiny, or too many."""
    size = sum(file.size for file in listed)
    return max(min(max(size // 16, MIN_PART_BYTES), MAX_PART_BYTES), size // MAX_PARTS)


def divide(listed: list[File], limit: int) -> list[list[Piece]]:
    """Parts of about `limit` bytes or of a single file."""
    parts: list[list[Piece]] = [[]]
    size = 0
    for file in listed:
        for piece in sources.cut(file, limit):
            length = piece.stop - piece.start
            if parts[-1] and size + length > limit:
                parts.append([])
                size = 0
            parts[-1].append(piece)
            size += length
    return parts


def part_file(folder: epath.Path, index: int) -> epath.Path:
    return folder / f"part-{index:05d}.json"


def read_part(folder: epath.Path, index: int) -> dict[str, Any]:
    """What was done of a part. Raises DataError if its record is damaged."""
    path = part_file(folder, index)
    try:
        record = json.loads(path.read_text())
        for key in ("shards", "sources", "hashes"):
            record[key]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: unreadable ({error!r}); delete it, the part is built again then") from None
    return record


def settings_of(config: DataConfig) -> dict[str, Any]:
    """The config without what changes nothing that is built."""
    settings = dataclasses.asdict(config)
    for key in (*_AFTERWARDS, *(field.name for field in dataclasses.fields(config) if field.metadata.get("free"))):
        del settings[key]
    defaults = dataclasses.asdict(DataConfig())
    for key in _LATER:
        if settings[key] == defaults[key]:
            del settings[key]
    return json.loads(json.dumps(settings))


def read_plan(folder: epath.Path) -> dict[str, Any]:
    """What an earlier build wrote, or nothing."""
    path = folder / PLAN
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise DataError(f"{path}: format {stored['format']}, but this version reads {FORMAT}")
        for key in ("settings", "part_bytes", "holdout_below", "files"):
            stored[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: unreadable ({error!r}); delete the directory to build again") from None
    return stored


def refuse(folder: epath.Path, different: list[str]) -> None:
    """Raises DataError if the directory was built from something else: if there is any difference."""
    if different:
        raise DataError(
            f"{folder} holds data built from something else:\n  "
            + some(different, 5, "\n  ")
            + "\nchoose another data.dir, or delete that directory to build again"
        )


def setting_differences(stored: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    defaults = dataclasses.asdict(DataConfig())
    before, settings = ({key: defaults[key] for key in _LATER} | given for given in (stored["settings"], settings))
    return [
        f"data.{key}: built with {before.get(key)!r}, now {settings.get(key)!r}"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]


def file_differences(folder: epath.Path, stored: dict[str, Any], plan: Plan) -> Iterator[str]:
    before, now = stored["files"], plan.to_dict()["files"]
    touched = set()
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            yield f"{name}: gone"
        elif name not in before:
            yield f"{name}: new"
        elif before[name][0] != now[name][0]:
            yield f"{name}: {before[name][0]} bytes before, now {now[name][0]}"
        elif before[name][1] != now[name][1]:
            touched.add(name)
    # A file with a new time may still be the same (a fresh copy or checkout): look at what is in it.
    for index, part in enumerate(plan.parts if touched else []):
        if not touched.intersection(piece.file.name for piece in part) or not part_file(folder, index).exists():
            continue
        for piece, digest in zip(part, read_part(folder, index)["hashes"], strict=False):
            if piece.file.name in touched and sources.content_hash(piece) != digest:
                yield f"{piece.file.name}: other content, of the same size"
