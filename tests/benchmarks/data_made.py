"""Built files of made-up documents for the benchmarks beside this file, which run as scripts, and how they measure."""

import dataclasses
import functools
import multiprocessing
import os
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from lm.data.config import DataConfig
from lm.data.corpus import Corpus, Source
from lm.data.files import write_json
from lm.data.manifest import FILE, Manifest, TokenizerRecord, read_manifest, token_dtype
from lm.data.records import ShardWriter

SHARD_TOKENS = 8_000_000
CHUNK = 1_000_000


def documents(tokens: int, vocab_size: int, seed: int) -> Iterator[np.ndarray]:
    """int64 [n] each: as long as pages of the web are (half below 500 tokens), of ids by Zipf's law."""
    draw = np.random.default_rng(seed)
    while tokens > 0:
        lengths = draw.lognormal(np.log(500), 1.2, 2000).astype(np.int64) + 2
        lengths = lengths[: max(1, np.searchsorted(np.cumsum(lengths), min(CHUNK, tokens)))]
        ids = (vocab_size ** draw.random(lengths.sum())).astype(np.int64) - 1
        yield from np.split(ids, np.cumsum(lengths)[:-1])
        tokens -= len(ids)


def write_source(folder: Path, tokens: int, vocab_size: int, seed: int) -> None:
    """A data directory as `lm data build` makes them, but for the tokenizer, which is not there."""
    folder.mkdir(parents=True)
    written = 0
    shards, writer = [], None
    for document in documents(tokens, vocab_size, seed):
        if writer is None:
            path = epath.Path(folder / f"train-{len(shards):05d}.array_record")
            writer, written = ShardWriter(path, token_dtype(vocab_size)), 0
        writer.add(document, 4 * len(document))
        written += len(document)
        if written >= SHARD_TOKENS:
            shards.append(writer.close())
            writer = None
    if writer is not None:
        shards.append(writer.close())
    record = TokenizerRecord("made up", "none", "none", vocab_size)
    write_json(epath.Path(folder / FILE), Manifest(record, {}, {"train": tuple(shards), "heldout": ()}).to_dict())


def write_sources(folder: Path, tokens: int, sources: int, vocab_size: int) -> list[Path]:
    """So many tokens in all."""
    found = [folder / f"{number:03d}" for number in range(sources)]
    for number, one in enumerate(found):
        write_source(one, tokens // sources, vocab_size, number)
    return found


def open_made(folders: Sequence[Path], **settings: Any) -> Corpus:
    """A corpus of these directories, each a source that is read as it is long."""
    sources = tuple(
        Source(one.name if len(folders) > 1 else "", epath.Path(one), read_manifest(one)) for one in folders
    )
    size = sources[0].manifest.tokenizer.vocab_size
    tokenizer: Any = types.SimpleNamespace(token_bytes=np.full(size, 4, np.int32))
    return Corpus(dataclasses.replace(DataConfig(), **settings), epath.Path(folders[0]), sources, tokenizer)


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process, so that other work on the machine counts little."""
    started = time.process_time()
    work()
    return time.process_time() - started


def per_step(work: Callable[[int], object], first: int, stretches: int = 4, seconds: float = 0.25) -> float:
    """CPU seconds of one step: the best of some stretches of steps that follow each other, without the first."""

    def stretch(start: int, count: int) -> None:
        for step in range(start, start + count):
            work(step)

    work(first)
    once = max(cpu_seconds(functools.partial(stretch, first + 1, 3)) / 3, 1e-6)
    count = max(3, int(seconds / once))
    starts = [first + 4 + i * count for i in range(stretches)]
    return min(cpu_seconds(functools.partial(stretch, start, count)) for start in starts) / count


def memory(field: str = "VmHWM") -> int:
    """Bytes of this process in memory: at most, or with "VmRSS" now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives in a fresh process on one core."""
    with multiprocessing.get_context("spawn").Pool(1, _one_core) as pool:
        return pool.apply(work, arguments)


def _one_core() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
