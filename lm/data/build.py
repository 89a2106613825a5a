"""`build`: text to tokenised shards, in parallel, continued where an interrupted build stopped.

The input is divided into parts that do not depend on each other. Part p becomes `train-p`, `heldout-p`
and then `part-p.json`, whose presence says that the part is done. `plan.json` is written first and says
what the parts are parts of; `manifest.json` is written last and is all that reading needs.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
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
from lm.data.plan import (
    PART_FILES,
    PLAN,
    Plan,
    divide,
    file_differences,
    part_bytes,
    part_file,
    read_plan,
    refuse,
    setting_differences,
    settings_of,
)
from lm.data.records import Shard, ShardWriter
from lm.data.sources import File, Piece
from lm.data.splits import Tally, holdout_below, split_pieces
from lm.data.tokenizers import FILE_NAMES, Tokenizer, load_tokenizer
from lm.data.vocabulary import make_tokenizer
from lm.errors import DataError

_BATCH_BYTES = 4 << 20  # of text that is in memory at once in each process, whatever the input


def build(config: DataConfig, directory: epath.PathLike, progress: Callable[[str], None]) -> Manifest:
    """Tokenises what `config` names into `directory`, or finds that this has been done.

    What was built is taken as it is, also when its sources have changed since or are not on this machine.
    The result does not depend on the number of processes.

    Raises:
        DataError: bad input; or the directory holds data built with other settings or `paths`, or the
            unfinished build of sources that have changed.
        ConfigError: `data.filter` cannot be imported.
        StorageError: the result cannot be written.
    """
    folder = epath.Path(directory)
    if (folder / FILE).exists():  # before the lock: the directory may be one that cannot be written
        return _as_built(config, folder, progress)
    sources.load_filter(config.filter)  # before anything is read: its name may be mistaken
    listed = sources.list_files(config.paths, config.holdout_paths)
    with files.sole_writer(folder, lambda: progress(f"another process is building {folder}; waiting for it")):
        if not (folder / FILE).exists():
            return _build(config, folder, listed, progress)
    return _as_built(config, folder, progress)


def _as_built(config: DataConfig, folder: epath.Path, progress: Callable[[str], None]) -> Manifest:
    stored = read_plan(folder)
    settings = settings_of(config)
    refuse(folder, setting_differences(stored, settings))
    _kept_tokenizer(config, folder)
    changed = f"sources changed since; using the data as built; delete {folder} to build anew"
    same_paths = stored.get("paths") == list(config.paths)
    try:
        listed = sources.list_files(config.paths, config.holdout_paths)
    except DataError:
        if not any(sources.present(p) for p in config.paths + config.holdout_paths):
            progress("the sources are not here; using the data as built")
        elif same_paths:
            progress(changed)
        else:
            raise
        return read_manifest(folder)
    limit = stored["part_bytes"]
    plan = Plan(config.paths, settings, limit, divide(listed, limit), stored["holdout_below"])
    different = list(file_differences(folder, stored, plan))
    if different and same_paths:
        progress(changed)
        return read_manifest(folder)
    refuse(folder, different)
    if plan.to_dict() != stored:
        files.write_json(folder / PLAN, plan.to_dict())
    return read_manifest(folder)


def _build(config: DataConfig, folder: epath.Path, listed: list[File], progress: Callable[[str], None]) -> Manifest:
    settings = settings_of(config)
    # Before the first part is done nothing depends on an earlier plan, which may be of a mistaken config.
    begun = any(folder.glob(PART_FILES))
    stored = read_plan(folder) if begun else {}
    limit = stored["part_bytes"] if stored else part_bytes(listed)
    parts = divide(listed, limit)
    plan = Plan(
        config.paths, settings, limit, parts, stored["holdout_below"] if stored else holdout_below(config, parts)
    )
    if stored:
        refuse(folder, [*setting_differences(stored, settings), *file_differences(folder, stored, plan)])
    if plan.to_dict() != stored:
        files.write_json(folder / PLAN, plan.to_dict())
    path = folder / FILE_NAMES[config.tokenizer.kind]
    if begun and path.exists():
        tokenizer = _kept_tokenizer(config, folder)
    else:
        tokenizer = make_tokenizer(config, parts, plan.holdout_below, progress)
        files.write_atomically(path, tokenizer.serialize())
    _build_parts(config, folder, plan, tokenizer, progress)
    for abandoned in folder.glob("*.tmp"):  # by builds that were killed
        abandoned.unlink(missing_ok=True)
    manifest = _collect(config, folder, plan, tokenizer)
    files.write_json(folder / FILE, manifest.to_dict())
    progress(
        f"built {folder}: {manifest.tokens('train'):,} tokens to train on, "
        f"{manifest.tokens('heldout'):,} held out, vocabulary {tokenizer.vocab_size}"
    )
    return manifest


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
    for batch in _batched(split_pieces(job.pieces, job.config, job.holdout_below, tally)):
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
    files.write_json(part_file(folder, job.index), record)
    return record


def _kept_tokenizer(config: DataConfig, folder: epath.Path) -> Tokenizer:
    """The tokenizer in the directory. Raises DataError if the file that it was taken from is another now."""
    wanted = config.tokenizer
    kept = load_tokenizer(wanted.kind, folder / FILE_NAMES[wanted.kind])
    changed = (
        wanted.path is not None
        and epath.Path(wanted.path).exists()
        and load_tokenizer(wanted.kind, wanted.path).fingerprint != kept.fingerprint
    )
    if changed:
        raise DataError(
            f"{wanted.path}: changed since {folder} was built with it; choose another data.dir or delete that directory"
        )
    return kept


def _build_parts(
    config: DataConfig, folder: epath.Path, plan: Plan, tokenizer: Tokenizer, progress: Callable[[str], None]
) -> None:
    jobs = [
        Job(config, os.fspath(folder), index, pieces, plan.holdout_below)
        for index, pieces in enumerate(plan.parts)
        if not part_file(folder, index).exists()
    ]
    if len(jobs) < len(plan.parts):
        progress(f"{len(plan.parts) - len(jobs)} of {len(plan.parts)} parts are there; going on")
    started = time.monotonic()
    total = sum(piece.stop - piece.start for job in jobs for piece in job.pieces)
    done = 0
    with contextlib.closing(_run(jobs, config.workers or os.cpu_count() or 1)) as finished:
        for count, job in enumerate(finished, 1):
            done += sum(piece.stop - piece.start for piece in job.pieces)
            rate = done / (time.monotonic() - started)
            progress(
                f"tokenised {count} of {len(jobs)} parts, {done / 1e6:.1f} of {total / 1e6:.1f} MB, "
                f"{rate / 1e6:.1f} MB/s, {(total - done) / rate if rate else 0:.0f} s left"
            )


def _run(jobs: list[Job], workers: int) -> Generator[Job, None, None]:
    """Builds the parts and yields each when it is done. Ended early, it ends the processes at once."""
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            build_part(job)
            yield job
        return
    others = set(multiprocessing.active_children())
    # spawn: the parent may run threads (of jax, of this module's callers) that a fork would not survive.
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("spawn"), _end_with_parent
    )
    try:
        futures = {pool.submit(build_part, job): job for job in jobs}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            yield futures[future]
        pool.shutdown()
    except BrokenProcessPool:
        raise DataError(
            "a process of the build was killed, perhaps for lack of memory; start it again to go on, "
            "with a smaller data.workers if it was memory"
        ) from None
    finally:
        # A running part may take long, and one that is not finished is built again anyway.
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        pool.shutdown(cancel_futures=True)


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
        record = json.loads(part_file(folder, index).read_text())
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
