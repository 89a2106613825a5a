"""`build`: text to tokenised shards, in parallel, continued where an interrupted build stopped.

The input is divided into parts that do not depend on each other. Part p becomes `train-p`, `heldout-p`
and then `part-p.json`, whose presence says that the part is done. `plan.json` is written first and says
what the parts are parts of; `manifest.json` is written last and is all that reading needs.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
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
from lm.data.plan import PLAN, Plan, compare, divide, part_bytes, part_file, read_plan, settings_of
from lm.data.records import Shard, ShardWriter
from lm.data.sources import Piece
from lm.data.splits import Tally, holdout_below, split_pieces, text_hash
from lm.data.tokenizers import FILE_NAMES, Tokenizer, chunks, load_tokenizer, train_sentencepiece
from lm.errors import DataError

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
    stored = read_plan(folder)
    settings = settings_of(config)
    try:
        listed = sources.list_files(config.paths, config.holdout_paths)
    except DataError:
        if not complete or any(sources.present(p) for p in config.paths + config.holdout_paths):
            raise
        compare(folder, stored, settings, None)
        progress("the sources are not here; using the data as built")
        return read_manifest(folder)
    limit = stored["part_bytes"] if stored else part_bytes(listed)
    parts = divide(listed, limit)
    if stored:
        plan = Plan(settings, limit, parts, stored["holdout_below"])
        compare(folder, stored, settings, plan)
    else:
        plan = Plan(settings, limit, parts, holdout_below(config, parts))
    if plan.to_dict() != stored:
        files.write_json(folder / PLAN, plan.to_dict())
    tokenizer = _tokenizer(config, folder, plan, progress)
    if complete:
        return read_manifest(folder)
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


def _tokenizer(config: DataConfig, folder: epath.Path, plan: Plan, progress: Callable[[str], None]) -> Tokenizer:
    wanted = config.tokenizer
    path = folder / FILE_NAMES[wanted.kind]
    stored = load_tokenizer(wanted.kind, path) if path.exists() else None
    if wanted.kind == "sentencepiece" and wanted.path is None:
        if stored is not None:
            return stored
        progress("training the tokenizer")
        sample = list(_sample(config, plan))
        tokenizer: Tokenizer = train_sentencepiece(sample, model_type=wanted.model_type, vocab_size=wanted.vocab_size)
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
        files.write_atomically(path, tokenizer.serialize())
    return tokenizer


def _sample(config: DataConfig, plan: Plan) -> Iterator[str]:
    """About `training_bytes` of training text in short stretches, chosen by hash, from every part."""
    share = config.tokenizer.training_bytes / max(1, sum(p.stop - p.start for part in plan.parts for p in part))
    # Of huge inputs only the first sixteenth that yields enough is read, part by part.
    below = int(min(1.0, max(share, 1 / 16)) * 2**64)
    for part in plan.parts:
        left = share * sum(piece.stop - piece.start for piece in part)
        for split, _, text, _ in split_pieces(part, config, plan.holdout_below, Tally()):
            if left <= 0 and share < 1:
                break
            for stretch in chunks(text, _SAMPLE_CHARACTERS) if split == "train" else ():
                raw = stretch.encode()
                if share >= 1 or text_hash(raw) < below:
                    left -= len(raw)
                    yield stretch


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
