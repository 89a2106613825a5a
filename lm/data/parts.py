"""A part of a build: the text of its pieces becomes one shard of each split, and then a record of what was done."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from lm.data import files, workers
from lm.data.config import DataConfig
from lm.data.duplicates import read_left_out
from lm.data.manifest import token_dtype
from lm.data.middle import cut, encode_cut, find_sentinels
from lm.data.overlap import INDEX, Overlap, OverlapReview
from lm.data.plan import part_file
from lm.data.records import ShardWriter
from lm.data.sources import Piece
from lm.data.splits import CHECKSUMS, Found, Review, Tally, split_pieces
from lm.data.tokenizers import FILE_NAMES, Tokenizer, load_tokenizer
from lm.errors import DataError

_BATCH_BYTES = 4 << 20  # of text that is in memory at once in each process, whatever the input


@dataclass(frozen=True)
class Job:
    """A part to build, as it is sent to another process."""

    config: DataConfig
    folder: str
    index: int
    pieces: list[Piece]
    holdout_below: int
    plan: str
    """The identity of the plan that the part is one of."""
    left_out_in: str | None = None
    """Where it says which documents are left out as duplicates."""


def build_part(job: Job) -> None:
    """Writes the shards of one part and then its record."""
    folder = epath.Path(job.folder)
    tokenizer = _loaded(job.config.tokenizer.kind, folder / FILE_NAMES[job.config.tokenizer.kind])
    dtype = token_dtype(tokenizer.vocab_size)
    writers: dict[str, ShardWriter] = {}
    tally = Tally()
    overlap = None
    if job.config.overlap_paths:
        overlap = OverlapReview(Overlap(folder / INDEX), tokenizer, remove=job.config.overlap == "remove")
    left_out = None if job.left_out_in is None else read_left_out(epath.Path(job.left_out_in), job.index)
    reviews = [review for review in (left_out and left_out.review(), overlap) if review is not None]
    for split, source, ids, size in _encoded(job, tokenizer, tally, reviews):
        if split not in writers:
            path = folder / f"{split}-{job.index:05d}.array_record"
            writers[split] = ShardWriter(path, dtype)
        document = np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id]), dtype=dtype, casting="unsafe")
        writers[split].add(document, size)
        tally.counts[source].update(tokens=len(ids) + 2, bytes=size)
    if left_out is not None and left_out.hashes != tally.hashes:
        names = ", ".join(sorted({piece.file.name for piece in job.pieces})[:3])
        raise DataError(f"{names}: changed since duplicates were looked for; delete {folder} to build anew")
    record: dict[str, Any] = {
        "plan": job.plan,
        "shards": {split: dataclasses.asdict(writer.close()) for split, writer in writers.items()},
        "sources": {
            name: {
                **tally.counts[name],
                "skipped": tally.skipped[name],
                "checksum": f"{tally.checksums.get(name, 0):064x}",
            }
            for name in tally.counts
        },
        "hashes": tally.hashes,
    }
    if overlap is not None:
        record["overlap"] = overlap.record()
    files.write_json(part_file(folder, job.index), record)
    workers.report(sum(piece.stop - piece.start for piece in job.pieces))


def added(checksum: str, other: str) -> str:
    """The checksum of all documents that two of them are of."""
    return f"{(int(checksum, 16) + int(other, 16)) % CHECKSUMS:064x}"


def _encoded(
    job: Job, tokenizer: Tokenizer, tally: Tally, reviews: list[Review]
) -> Iterator[tuple[str, str, np.ndarray, int]]:
    """(split, source, ids without begin and end, bytes of text)."""

    def review(found: Found) -> str | None:
        return next((reason for one in reviews if (reason := one(found)) is not None), None)

    config = job.config
    sentinels = find_sentinels(tokenizer, config.fim_tokens) if config.fim_rate else None
    documents = split_pieces(job.pieces, config, job.holdout_below, tally, review, tokenizer)
    for batch in _batched(documents):
        texts: list[Any] = [text for _, _, text, _ in batch]
        if config.tokens:
            encoded = texts
        else:
            cuts = [cut(text, config.fim_rate) if split == "train" else None for split, _, text, _ in batch]
            encoded = encode_cut(tokenizer, texts, cuts, sentinels)
            for (_, source, _, _), where in zip(batch, cuts, strict=True):
                if where is not None:
                    tally.counts[source]["fim_documents"] += 1
        for (split, source, _, size), ids in zip(batch, encoded, strict=True):
            yield split, source, ids, size
        workers.report(tally.bytes_read)


def _batched(texts: Iterable[tuple[str, str, Any, int]]) -> Iterator[list[tuple[str, str, Any, int]]]:
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
