"""`build`: text to tokenised shards, in parallel, continued where an interrupted build stopped.

The input is divided into parts that do not depend on each other. Part p becomes `train-p`, `heldout-p`
and then `part-p.json`, whose presence says that the part is done. `plan.json` is written first and says
what the parts are parts of; `manifest.json` is written last and is all that reading needs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from lm.data import files, sources
from lm.data.config import DataConfig
from lm.data.manifest import (
    FILE,
    SPLITS,
    Manifest,
    SourceCount,
    TokenizerRecord,
    read_manifest,
    token_dtype,
)
from lm.data.records import FORMAT, Shard, ShardWriter
from lm.data.sources import Document, File, Piece
from lm.data.tokenizers import FILE_NAMES, Tokenizer, chunks, load_tokenizer, train_sentencepiece
from lm.errors import DataError, StorageError

PLAN = "plan.json"

MIN_PART_BYTES = 4 << 20
MAX_PART_BYTES = 64 << 20

_BATCH_BYTES = 4 << 20  # of text that is in memory at once in each process, whatever the input
_SAMPLE_CHARACTERS = 4096


def build(config: DataConfig, directory: epath.PathLike, progress: Callable[[str], None]) -> Manifest:
    """Tokenises what `config` names into `directory`, or finds that this has been done.

    What was built is taken as it is when its sources are unchanged (by size and time, or else by
    content) or not on this machine at all. The result does not depend on the number of processes.

    Raises:
        DataError: bad input; or the directory holds data built from something else.
        StorageError: the result cannot be written.
    """
    folder = epath.Path(directory)
    complete = (folder / FILE).exists()
    try:
        listed = sources.list_files(config.paths, config.holdout_paths)
    except DataError:
        if not complete or any(sources.present(p) for p in config.paths + config.holdout_paths):
            raise
        _compare(folder, _settings(config), None)
        progress("the sources are not here; using the data as built")
        return read_manifest(folder)
    limit = min(max(sum(file.size for file in listed) // 16, MIN_PART_BYTES), MAX_PART_BYTES)
    plan = Plan(_settings(config), limit, _parts(listed, limit))
    if (folder / PLAN).exists():
        plan = dataclasses.replace(plan, holdout_below=_compare(folder, plan.settings, plan))
    else:
        plan = dataclasses.replace(plan, holdout_below=_holdout_below(config, plan.parts))
        _write(folder / PLAN, plan.to_dict())
    tokenizer = _tokenizer(config, folder, plan, progress)
    if complete:
        return read_manifest(folder)
    _build_parts(config, folder, plan, tokenizer, progress)
    manifest = _collect(config, folder, plan, tokenizer)
    _write(folder / FILE, manifest.to_json())
    progress(
        f"built {folder}: {manifest.tokens('train'):,} tokens to train on, "
        f"{manifest.tokens('heldout'):,} held out, vocabulary {tokenizer.vocab_size}"
    )
    return manifest


@dataclass(frozen=True)
class Plan:
    """What is built: everything that decides the result. Documents with smaller hashes are held out."""

    settings: dict[str, Any]
    part_bytes: int
    parts: list[list[Piece]]
    holdout_below: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "settings": self.settings,
            "part_bytes": self.part_bytes,
            "holdout_below": self.holdout_below,
            "files": {f.name: [f.size, f.modified, f.heldout] for f in self.files().values()},
        }

    def files(self) -> dict[str, File]:
        return {piece.file.name: piece.file for part in self.parts for piece in part}


@dataclass(frozen=True)
class Job:
    """A part to build, as it is sent to another process."""

    config: DataConfig
    folder: str
    index: int
    pieces: list[Piece]
    holdout_below: int


def build_part(job: Job) -> dict[str, Any]:
    """Writes the shards of one part and then its record, which is also returned."""
    folder = epath.Path(job.folder)
    tokenizer = _loaded(job.config.tokenizer.kind, folder / FILE_NAMES[job.config.tokenizer.kind])
    dtype = token_dtype(tokenizer.vocab_size)
    writers: dict[str, ShardWriter] = {}
    tally = Tally()
    for batch in _batched(_split_pieces(job.pieces, job.config, job.holdout_below, tally)):
        encoded = tokenizer.encode_batch([text for _, _, text, _ in batch])
        for (split, source, _, size), ids in zip(batch, encoded, strict=True):
            if split not in writers:
                path = folder / f"{split}-{job.index:05d}.array_record"
                writers[split] = ShardWriter(path, dtype)
            writers[split].add(np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id])), size)
            tally.counts[source].update(tokens=len(ids) + 2, bytes=size)
    record = {
        "shards": {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()},
        "sources": {name: {**tally.counts[name], "skipped": tally.skipped[name]} for name in tally.counts},
        "hashes": tally.hashes,
    }
    _write(_part_file(folder, job.index), record)
    return record


@dataclass
class Tally:
    """What was read: documents by source, what was left out, and the hash of each piece."""

    counts: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    skipped: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    hashes: list[str] = dataclasses.field(default_factory=list)


def _split_pieces(
    pieces: Iterable[Piece], config: DataConfig, holdout_below: int, tally: Tally
) -> Iterator[tuple[str, str, str, int]]:
    """(split, source, text, bytes of text) of every document, or of both ends of it."""
    for piece in pieces:
        source = piece.file.source
        count = tally.counts.setdefault(source, Counter())
        skipped = tally.skipped.setdefault(source, Counter())
        digest = hashlib.sha256()
        for document in sources.documents(piece, config.text_field, skipped, digest):
            count["documents"] += 1
            for split, text, size in _split(document, piece, config, holdout_below):
                count["heldout_documents"] += split == "heldout"
                yield split, source, text, size
        tally.hashes.append(digest.hexdigest())


def _split(
    document: Document, piece: Piece, config: DataConfig, holdout_below: int
) -> list[tuple[str, str, int]]:
    size = len(document.raw)
    if config.holdout_paths:
        return [("heldout" if piece.file.heldout else "train", document.text, size)]
    if config.holdout_by == "document":
        heldout = _hash(document.raw) < holdout_below
        return [("heldout" if heldout else "train", document.text, size)]
    middle = int((1 - config.holdout_fraction) * size)
    while middle < size and document.raw[middle] & 0xC0 == 0x80:  # inside a character
        middle -= 1
    ends = [("train", document.raw[:middle]), ("heldout", document.raw[middle:])]
    return [(split, raw.decode(), len(raw)) for split, raw in ends if raw]


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "big")


def _holdout_below(config: DataConfig, parts: list[list[Piece]]) -> int:
    """The hash below which documents are held out; at least one is, however few there are."""
    if config.holdout_paths or config.holdout_by == "tail" or config.holdout_fraction == 0:
        return 0
    wanted = int(config.holdout_fraction * 2**64)
    smallest, largest = 2**64, -1
    for part in parts:
        for piece in part:
            for document in sources.documents(piece, config.text_field, Counter()):
                value = _hash(document.raw)
                if value < wanted:
                    return wanted
                smallest, largest = min(smallest, value), max(largest, value)
    if largest < 0:
        raise DataError(f"data.paths: no document with text in {', '.join(config.paths)}")
    if smallest == largest:
        raise DataError(
            "data.holdout_fraction: there is only one document, so none can be held out; set "
            "data.holdout_by to 'tail' to hold out its end, or name other files in data.holdout_paths"
        )
    return smallest + 1


def _parts(listed: list[File], limit: int) -> list[list[Piece]]:
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


def _tokenizer(
    config: DataConfig, folder: epath.Path, plan: Plan, progress: Callable[[str], None]
) -> Tokenizer:
    wanted = config.tokenizer
    path = folder / FILE_NAMES[wanted.kind]
    stored = load_tokenizer(wanted.kind, path) if path.exists() else None
    if wanted.kind == "sentencepiece" and wanted.path is None:
        if stored is not None:
            return stored
        progress("training the tokenizer")
        sample = list(_sample(config, plan))
        tokenizer: Tokenizer = train_sentencepiece(
            sample, model_type=wanted.model_type, vocab_size=wanted.vocab_size
        )
        if tokenizer.vocab_size < wanted.vocab_size and wanted.model_type != "char":
            progress(f"the text supports a vocabulary of {tokenizer.vocab_size}, not {wanted.vocab_size}")
    else:
        if stored is not None and wanted.path is not None and not epath.Path(wanted.path).exists():
            return stored
        tokenizer = load_tokenizer(wanted.kind, wanted.path or b"")
        if stored is not None and stored.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{wanted.path}: changed since {folder} was built with it; "
                "choose another data.dir or delete that directory"
            )
    if stored is None:
        _write(path, tokenizer.serialize())
    return tokenizer


def _sample(config: DataConfig, plan: Plan) -> Iterator[str]:
    """About `training_bytes` of training text in short stretches, chosen by hash, from every part."""
    share = config.tokenizer.training_bytes / max(
        1, sum(p.stop - p.start for part in plan.parts for p in part)
    )
    # Of huge inputs only the first sixteenth that yields enough is read, part by part.
    below = int(min(1.0, max(share, 1 / 16)) * 2**64)
    for part in plan.parts:
        left = share * sum(piece.stop - piece.start for piece in part)
        for split, _, text, _ in _split_pieces(part, config, plan.holdout_below, Tally()):
            if left <= 0 and share < 1:
                break
            for stretch in chunks(text, _SAMPLE_CHARACTERS) if split == "train" else ():
                raw = stretch.encode()
                if share >= 1 or _hash(raw) < below:
                    left -= len(raw)
                    yield stretch


def _build_parts(
    config: DataConfig, folder: epath.Path, plan: Plan, tokenizer: Tokenizer, progress: Callable[[str], None]
) -> None:
    jobs = [
        Job(config, os.fspath(folder), index, pieces, plan.holdout_below)
        for index, pieces in enumerate(plan.parts)
        if not _part_file(folder, index).exists()
    ]
    if len(jobs) < len(plan.parts):
        progress(f"{len(plan.parts) - len(jobs)} of {len(plan.parts)} parts are there; going on")
    started = time.monotonic()
    total = sum(piece.stop - piece.start for job in jobs for piece in job.pieces)
    done = 0
    for count, job in enumerate(_run(jobs, config.workers or os.cpu_count() or 1), 1):
        done += sum(piece.stop - piece.start for piece in job.pieces)
        rate = done / (time.monotonic() - started)
        progress(
            f"tokenised {count} of {len(jobs)} parts, {done / 1e6:.1f} of {total / 1e6:.1f} MB, "
            f"{rate / 1e6:.1f} MB/s, {(total - done) / rate if rate else 0:.0f} s left"
        )


def _run(jobs: list[Job], workers: int) -> Iterator[Job]:
    """Builds the parts and yields each when it is done."""
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            build_part(job)
            yield job
        return
    # spawn: the parent may run threads (of jax, of this module's callers) that a fork would not survive.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("spawn"), _end_with_parent
    )
    with pool:
        futures = {pool.submit(build_part, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            raise DataError(
                "a process of the build was killed, perhaps for lack of memory; start it again to go on, "
                "with a smaller data.workers if it was memory"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all; only the parent has to speak
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _collect(config: DataConfig, folder: epath.Path, plan: Plan, tokenizer: Tokenizer) -> Manifest:
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    counts: dict[str, Counter[str]] = {}
    skipped: dict[str, Counter[str]] = {}
    for index in range(len(plan.parts)):
        record = json.loads(_part_file(folder, index).read_text())
        for split, shard in record["shards"].items():
            splits[split].append(Shard(**shard))
        for source, count in record["sources"].items():
            skipped.setdefault(source, Counter()).update(count.pop("skipped"))
            counts.setdefault(source, Counter()).update(count)
    if not splits["train"]:
        left = "; all text was held out" if splits["heldout"] else ""
        raise DataError(f"data.paths: no document to train on in {', '.join(config.paths)}{left}")
    if not splits["heldout"] and (config.holdout_paths or config.holdout_fraction):
        raise DataError("data: no text was held out; check data.holdout_paths and data.holdout_fraction")
    return Manifest(
        TokenizerRecord(tokenizer.kind, tokenizer.file_name, tokenizer.fingerprint, tokenizer.vocab_size),
        {source: SourceCount(**counts[source], skipped=dict(skipped[source])) for source in counts},
        {split: tuple(shards) for split, shards in splits.items()},
    )


def _settings(config: DataConfig) -> dict[str, Any]:
    """The config without what only says where files are or how fast they are built."""
    settings = dataclasses.asdict(config)
    for key in ("paths", "dir", "workers"):
        del settings[key]
    return json.loads(json.dumps(settings))


def _compare(folder: epath.Path, settings: dict[str, Any], plan: Plan | None) -> int:
    """The `holdout_below` of the directory. Raises DataError if it was built from something else."""
    try:
        stored = json.loads((folder / PLAN).read_text())
        before = stored["settings"]
        different = [
            f"data.{key}: built with {before.get(key)!r}, now {settings.get(key)!r}"
            for key in sorted(before.keys() | settings.keys())
            if before.get(key) != settings.get(key)
        ]
        if stored["format"] != FORMAT:
            different.append(f"format {stored['format']}, this version writes {FORMAT}")
        if plan is not None:
            different += _file_differences(folder, stored, plan)
        below = int(stored["holdout_below"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / PLAN}: unreadable ({error!r}); delete the directory to build again"
        ) from None
    if different:
        more = [f"and {len(different) - 5} more"] if len(different) > 5 else []
        raise DataError(
            f"{folder} holds data built from something else:\n  "
            + "\n  ".join(different[:5] + more)
            + "\nchoose another data.dir, or delete that directory to build again"
        )
    if plan is not None and stored["files"] != plan.to_dict()["files"]:
        _write(folder / PLAN, plan.to_dict() | {"holdout_below": below})  # the new times, to look only once
    return below


def _file_differences(folder: epath.Path, stored: dict[str, Any], plan: Plan) -> Iterator[str]:
    before, now = stored["files"], plan.to_dict()["files"]
    if stored["part_bytes"] != plan.part_bytes:
        yield f"parts of {stored['part_bytes']} bytes, now {plan.part_bytes}"
    touched = set()
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            yield f"{name}: gone"
        elif name not in before:
            yield f"{name}: new"
        elif before[name][0] != now[name][0]:
            yield f"{name}: {before[name][0]} bytes before, now {now[name][0]}"
        elif before[name][2] != now[name][2]:
            yield f"{name}: moved between training and held-out"
        elif before[name][1] != now[name][1]:
            touched.add(name)
    # A file with a new time may still be the same (a fresh copy or checkout): look at what is in it.
    for index, part in enumerate(plan.parts if touched else []):
        record = _part_file(folder, index)
        if not touched.intersection(piece.file.name for piece in part) or not record.exists():
            continue
        for piece, digest in zip(part, json.loads(record.read_text())["hashes"], strict=False):
            if piece.file.name in touched and sources.content_hash(piece) != digest:
                yield f"{piece.file.name}: other content, of the same size"


def _batched(texts: Iterable[tuple[str, str, str, int]]) -> Iterator[list[tuple[str, str, str, int]]]:
    batch, size = [], 0
    for item in texts:
        batch.append(item)
        size += item[3]
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _loaded(kind: str, path: epath.Path) -> Tokenizer:
    return load_tokenizer(kind, path)


def _part_file(folder: epath.Path, index: int) -> epath.Path:
    return folder / f"part-{index:05d}.json"


def _write(path: epath.Path, content: bytes | str | dict[str, Any]) -> None:
    if isinstance(content, dict):
        content = json.dumps(content, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from None
