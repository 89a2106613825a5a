"""What comes of looking at every shard, in several processes."""

from __future__ import annotations

import itertools
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from etils import epath

from lm.data import workers
from lm.data.corpus import Corpus
from lm.data.manifest import SPLITS
from lm.data.progress import Meter, Progress
from lm.data.records import Shard, ShardReader

_ALONE_BYTES = 32 << 20  # as much as is read in the time that other processes take to start

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Place:
    """A shard of a split."""

    source: int
    name: str
    """Of the source."""
    path: str
    shard: Shard
    begin: int
    """Position in the stream of the source of its first token."""

    def reader(self) -> ShardReader:
        return ShardReader(epath.Path(self.path), self.shard, self.name)


def places(corpus: Corpus, split: str) -> list[Place]:
    """All shards of a split, by source and in the order of the stream."""
    found = []
    for number, one in enumerate(corpus.sources):
        shards = one.manifest.splits[split]
        ends = itertools.accumulate(shard.tokens for shard in shards)
        for shard, end in zip(shards, ends, strict=True):
            path = str(epath.Path(one.directory) / shard.file)
            found.append(Place(number, one.name, path, shard, end - shard.tokens))
    return found


def scan(
    function: Callable[[Place], _Result], where: Sequence[Place], processes: int, doing: str, progress: Progress
) -> Iterator[tuple[Place, _Result]]:
    """What `function` gives for each of the places, as each of them is done; 0 `processes` is one for each core.

    Raises DataError when a process was killed, and what `function` raises.
    """
    if not where:
        return
    total = sum(place.shard.size for place in where)
    small, done = total < _ALONE_BYTES, 0
    meter = Meter(doing, total, progress)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_Job(function, place, Path(folder) / str(number)) for number, place in enumerate(where)]
        for job in workers.run(_do, jobs, 1 if small else processes):
            yield job.place, pickle.loads(job.result.read_bytes())
            job.result.unlink()
            done += job.place.shard.size
            if not small:
                meter(done)
    if not small:
        meter.finish()


def verify(corpus: Corpus, progress: Progress) -> int:
    """Reads all shards of both splits, and gives their number. Raises DataError for one that is not as it was built."""
    found = [place for split in SPLITS for place in places(corpus, split)]
    return sum(1 for _ in scan(_verify, found, corpus.data.workers, "verifying", progress))


def _verify(place: Place) -> None:
    place.reader().verify()


@dataclass(frozen=True)
class _Job(Generic[_Result]):
    function: Callable[[Place], _Result]
    place: Place
    result: Path
    """A file: what a process gives back does not wait in the memory of another."""


def _do(job: _Job[Any]) -> None:
    job.result.write_bytes(pickle.dumps(job.function(job.place)))
