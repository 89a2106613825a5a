"""A run of 1,024 hosts: each has its own batches, and asks for its rows of each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.data.batches import Batches
from lm.data.config import DataConfig, PhaseConfig, SourceConfig
from lm.data.corpus import Corpus, open_corpus

Write = Callable[..., Path]

HOSTS, ROWS, LENGTH = 1024, 2, 8
SIZES = {"web": 70_001, "code": 40_000, "books": 9_999}


@pytest.fixture
def corpus(write_data: Write) -> Corpus:
    """Three sources."""
    found = []
    for name, size in SIZES.items():
        ends = np.cumsum(np.random.default_rng(size).integers(1, 40, size))
        documents = np.split(np.arange(size) * 7919 % 251, ends[ends < size])
        folder = write_data([documents[::2], documents[1::2]], name=name)
        found.append(SourceConfig(name, dir=str(folder)))
    phases = (
        PhaseConfig(0, (("web", 0.6), ("code", 0.3), ("books", 0.1))),
        PhaseConfig(500, (("web", 0.2), ("code", 0.2), ("books", 0.6))),
    )
    return open_corpus(Path(found[0].dir or "").parent, DataConfig(sources=tuple(found), mixture=phases))


def rows_of(host: int, step: int) -> slice | np.ndarray:
    """Rows next to each other; in odd steps far apart, as of a mesh whose other axes are inside a host."""
    if step % 2:
        return np.arange(host, HOSTS * ROWS, HOSTS)
    return slice(ROWS * host, ROWS * host + ROWS)


def steps_of_interest(whole: Batches) -> dict[str, int]:
    """The first, one in which each source begins again, and a late one."""
    found = {"first": 0, "a million": 10**6}
    for source, order in enumerate(whole.orders):
        last = whole.mixture.rows(source, 3 * order.rows_per_epoch - 1)
        assert last is not None
        found[f"end of source {source}"] = last // whole.batch_size
    return found


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_the_rows_of_all_hosts_are_the_batch(corpus: Corpus, packing: str) -> None:
    corpus = dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, packing=packing))
    whole = Batches(corpus, HOSTS * ROWS, LENGTH, seed=3)
    steps = steps_of_interest(whole)
    assert {step % 2 for step in steps.values()} == {0, 1}
    expected = {step: whole.batch(step) for step in steps.values()}
    covered: dict[int, list[int]] = {step: [] for step in expected}
    for host in range(HOSTS):
        batches = Batches(corpus, HOSTS * ROWS, LENGTH, seed=3)
        for step in list(expected)[:: 1 if host % 2 else -1]:  # in whatever order
            rows = rows_of(host, step)
            mine = batches.batch(step, rows)
            assert all((mine[name] == values[rows]).all() for name, values in expected[step].items())
            covered[step] += np.arange(HOSTS * ROWS)[rows].tolist()
    for name, step in steps.items():
        assert sorted(covered[step]) == list(range(HOSTS * ROWS))
        read = []
        for row in whole.rows(step):
            tokens = list(SIZES.values())[row.source]
            read += [(row.source, row.epoch, (start + i) % tokens) for start, n in row.spans for i in range(n)]
        assert len(set(read)) == len(read) >= 0.99 * HOSTS * ROWS * LENGTH  # no row twice, as no token is
        if name.startswith("end of "):  # both sides of it are in the batch
            assert {(int(name[-1]), 2), (int(name[-1]), 3)} <= {(source, epoch) for source, epoch, _ in read}
