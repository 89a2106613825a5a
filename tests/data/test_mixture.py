from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from lm.data.batches import Batches
from lm.data.config import DataConfig, PhaseConfig, SourceConfig
from lm.data.corpus import Corpus, open_corpus
from lm.data.mixture import Mixture, Shares
from lm.errors import ConfigError

Write = Callable[..., Path]

ONE = 1 << 31

WEIGHTS = {
    "one": {"a": 3.0},
    "two": {"a": 0.8, "b": 0.2},
    "equal": dict.fromkeys("abcde", 1.0),
    "far apart": {"a": 1.0, "b": 1e-6},
    "many": {f"s{i:03d}": float(w) for i, w in enumerate(np.random.default_rng(0).random(300))},
    "steep": {f"s{i}": 0.5**i for i in range(20)},
    "none of one": {"a": 1.0, "b": 0.0, "c": 2.0},
    "ties": {"a": 1.0, "b": 2.0, "c": 1.0, "d": 5.0},
    "next to nothing": {"a": 1.0, "b": 1e-12},
}


class Fork:
    """Two sides, the heavier left, and how many rows have passed."""

    def __init__(self, left: Fork | str, right: Fork | str, share: Fraction) -> None:
        self.left, self.right, self.share, self.passed = left, right, share, 0

    def next(self) -> str:
        """Left, when that brings the left side nearer to its share of all that have passed."""
        before, after = (math.floor(n * self.share + Fraction(1, 2)) for n in (self.passed, self.passed + 1))
        self.passed += 1
        side = self.left if after > before else self.right
        return side if isinstance(side, str) else side.next()


def forks(weights: Mapping[str, float]) -> Fork | str:
    """The two lightest become one until one is left; of equals the first by name."""
    nodes: list[tuple[float, str, Fork | str]] = [(w, name, name) for name, w in sorted(weights.items()) if w > 0]
    while len(nodes) > 1:
        nodes.sort(key=lambda node: node[:2])
        (light, _, right), (heavy, name, left) = nodes[:2]
        share = min(max(round(heavy / (heavy + light) * ONE), 1), ONE - 1)
        nodes[:2] = [(light + heavy, name, Fork(left, right, Fraction(share, ONE)))]
    return nodes[0][2]


def drawn_weights(seed: int) -> dict[str, float]:
    draw = np.random.default_rng(seed)
    return {f"s{i}": float(10 ** (-6 * draw.random())) for i in range(draw.integers(2, 40))}


def worst_window(sources: np.ndarray, shares: list[float]) -> float:
    """How far the rows of a source in any window are from their share, over all windows."""
    worst = 0.0
    for source, share in enumerate(shares):
        ahead = np.concatenate([[0], np.cumsum(sources == source)]) - np.arange(len(sources) + 1) * share
        worst = max(worst, ahead.max() - ahead.min())
    return worst


@pytest.mark.parametrize("case", WEIGHTS)
def test_rows_are_dealt_as_one_by_one(case: str) -> None:
    shares = Shares(WEIGHTS[case])
    source, index = shares.deal(np.arange(3000))
    root = forks(WEIGHTS[case])
    seen = dict.fromkeys(WEIGHTS[case], 0)
    for row in range(3000):
        name = root if isinstance(root, str) else root.next()
        assert (shares.names[source[row]], index[row]) == (name, seen[name]), row
        seen[name] += 1
    assert shares.counts(3000) == {name: seen[name] for name in shares.names}


@pytest.mark.parametrize("first", [0, 10**6, 2**40 - 500, 2**52])
@pytest.mark.parametrize("case", WEIGHTS)
def test_row_is_the_inverse_of_deal(case: str, first: int) -> None:
    shares = Shares(WEIGHTS[case])
    rows = np.arange(first, first + 1000)
    source, index = shares.deal(rows)
    places = zip(source.tolist(), index.tolist(), strict=True)
    assert [shares.row(*place) for place in places] == rows.tolist()
    before, after = shares.counts(first), shares.counts(first + 1000)
    for one, name in enumerate(shares.names):
        assert index[source == one].tolist() == list(range(before[name], after[name]))
        assert shares.row(one, after[name]) >= first + 1000 > shares.row(one, after[name] - 1)
    assert sum(after.values()) == first + 1000


@pytest.mark.parametrize("first", [0, 2**40 + 12345])
@pytest.mark.parametrize("case", [*WEIGHTS, *range(30)])
def test_every_window_has_the_shares_to_three_rows(case: str | int, first: int) -> None:
    weights = WEIGHTS[case] if isinstance(case, str) else drawn_weights(case)
    shares = Shares(weights)
    source, _ = shares.deal(np.arange(first, first + 20_000))
    assert worst_window(source, [shares.shares[name] for name in shares.names]) <= 3
    assert sum(shares.shares.values()) == pytest.approx(1)


def test_a_source_of_a_millionth_comes_once_in_a_million() -> None:
    shares = Shares(WEIGHTS["far apart"])
    assert shares.counts(10**12)["b"] == pytest.approx(10**12 / (10**6 + 1), rel=1e-3)
    gaps = np.diff([shares.row(1, index) for index in range(1000)])
    assert gaps.max() - gaps.min() <= 1


def test_neither_order_nor_scale_of_the_weights_matters() -> None:
    weights = drawn_weights(3)
    turned = {name: 64 * weights[name] for name in reversed(weights)}
    rows = np.arange(5000)
    for one, other in zip(Shares(weights).deal(rows), Shares(turned).deal(rows), strict=True):
        assert (one == other).all()
    names = list(weights)
    source, index = Mixture(names, [(0, weights)]).deal(np.arange(5000))
    swapped, same_index = Mixture(names[::-1], [(0, turned)]).deal(np.arange(5000))
    assert [names[i] for i in source] == [names[::-1][i] for i in swapped]
    assert (index == same_index).all()


PHASES = [(0, {"a": 0.7, "b": 0.3}), (1000, {"b": 0.5, "c": 0.5}), (1001, {"c": 1.0}), (5000, {"a": 0.1, "c": 0.9})]


def test_phases_follow_each_other_without_a_gap() -> None:
    mixture = Mixture("abc", PHASES)
    source, index = mixture.deal(np.arange(12_000))
    counts = mixture.counts(12_000)
    for one, name in enumerate("abc"):
        mine = np.flatnonzero(source == one)
        assert index[mine].tolist() == list(range(counts[name]))
        assert [mixture.rows(one, i) for i in range(counts[name])] == mine.tolist()
    stops = [start for start, _ in PHASES[1:]] + [12_000]
    for (start, weights), stop in zip(PHASES, stops, strict=True):
        assert mixture.shares(start) == mixture.shares(stop - 1)
        assert mixture.shares(start) == pytest.approx(weights)
        shares = [mixture.shares(start).get(name, 0) for name in "abc"]
        assert worst_window(source[start:stop], shares) <= 3
        assert {"abc"[i] for i in source[start:stop]} <= set(weights)
    assert mixture.rows(1, counts["b"]) is None  # after its last phase b is never read again
    some = np.random.default_rng(0).integers(0, 12_000, 500)
    for rows in (some, some[:0], some[:1], np.arange(995, 1003)):
        found = mixture.deal(rows)
        assert (found[0] == source[rows]).all()
        assert (found[1] == index[rows]).all()


def test_late_rows_are_reached_at_once() -> None:
    mixture = Mixture("abc", [(0, {"a": 1.0, "b": 2.0}), (2**41, {"a": 1.0, "b": 2.0, "c": 3.0})])
    first = 2**41 - 100
    source, index = mixture.deal(np.arange(first, first + 300))
    for row, (one, number) in enumerate(zip(source.tolist(), index.tolist(), strict=True)):
        assert mixture.rows(one, number) == first + row
    assert source[:100].max() == 1
    assert mixture.counts(first + 100)["b"] == pytest.approx(2**42 / 3, abs=2000)
    assert index[source == 2].tolist() == list(range((source == 2).sum()))


# Through batches

SIZES = {"web": 3000, "code": 700, "books": 333}
MIXTURE = (
    PhaseConfig(0, (("web", 0.7), ("code", 0.3))),
    PhaseConfig(4, (("web", 0.5), ("code", 0.25), ("books", 0.25))),
    PhaseConfig(9, (("web", 0.4), ("books", 0.6))),
)


@pytest.fixture
def corpus(write_data: Write) -> Corpus:
    """Three sources; no token is in two of them."""
    draw = np.random.default_rng(0)
    found = []
    for number, (name, size) in enumerate(SIZES.items()):
        ends = np.sort(draw.choice(np.arange(1, size), size // 40, replace=False))
        documents = np.split(draw.integers(80 * number, 80 * number + 80, size), ends)
        folder = write_data([documents[:20], documents[20:]] if len(documents) > 20 else [documents], name=name)
        found.append(SourceConfig(name, dir=str(folder)))
    data = DataConfig(sources=tuple(found), mixture=MIXTURE)
    return open_corpus(Path(found[0].dir or "").parent, data)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_the_share_of_each_source_in_any_window_of_steps(corpus: Corpus, packing: str) -> None:
    mixture = tuple(dataclasses.replace(phase, from_step=1000 * i) for i, phase in enumerate(MIXTURE))
    data = dataclasses.replace(corpus.data, mixture=mixture, packing=packing)
    batches = Batches(dataclasses.replace(corpus, data=data), 1024, 16, seed=1)
    draw = np.random.default_rng(1)
    for step in [0, 1, 999, 1000, 1001, 2000, 10**6, *draw.integers(0, 3000, 4).tolist()]:
        batch = batches.batch(step)
        named = batch["tokens"] // 80
        used = batches.places(step)[0]
        weights = dict(mixture[min(step // 1000, 2)].weights)
        for number, name in enumerate(SIZES):
            assert (used == number).mean() == pytest.approx(weights.get(name, 0), abs=0.005)
            assert (named[used == number][batch["segments"][used == number] > 0] == number).all()
    for first, last in draw.integers(0, 3000, (20, 2)).tolist():
        first, last = sorted((first, last + 1))
        before, after = (batches.mixture.counts(step * 1024) for step in (first, last))
        for name in SIZES:
            due = sum(dict(mixture[min(step // 1000, 2)].weights).get(name, 0) for step in range(first, last))
            assert abs(after[name] - before[name] - 1024 * due) <= 0.005 * 1024 * (last - first)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_each_epoch_of_a_source_holds_its_tokens_once(corpus: Corpus, packing: str) -> None:
    batches = Batches(
        dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, packing=packing)), 24, 16, seed=5
    )
    steps = 60
    seen: dict[tuple[int, int], np.ndarray] = {}
    read = [0, 0, 0]
    where: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for step in range(steps):
        assert batches.epochs(step) == [n / o.rows_per_epoch for n, o in zip(read, batches.orders, strict=True)]
        for number, row in enumerate(batches.rows(step)):
            assert row.epoch == read[row.source] // batches.orders[row.source].rows_per_epoch
            read[row.source] += 1
            tokens = list(SIZES.values())[row.source]
            count = seen.setdefault((row.source, row.epoch), np.zeros(tokens, int))
            for start, length in row.spans:
                positions = np.arange(start, start + length) % tokens
                np.add.at(count, positions, 1)
                for position in positions.tolist():
                    if position % 97 == 0:
                        where.setdefault((row.source, position), []).append((step, number, 1))
    for (source, epoch), count in seen.items():
        done = (epoch + 1) * batches.orders[source].rows_per_epoch <= read[source]
        assert (count == 1).all() if done else count.max() <= 1
    assert all(n > batches.orders[source].rows_per_epoch for source, n in enumerate(read))
    for (source, position), found in where.items():
        assert list(batches.rows_with(source, position, 1, steps)) == found
        assert list(batches.rows_with(source, position, 1, found[0][0])) == []


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_any_step_in_any_order(corpus: Corpus, packing: str) -> None:
    corpus = dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, packing=packing))
    steps = [0, 3, 4, 8, 9, 40, 10**6, 10**9]
    forward = Batches(corpus, 8, 16, seed=7)
    expected = {step: forward.batch(step) for step in steps}
    for step in reversed(steps):
        found = Batches(corpus, 8, 16, seed=7).batch(step)
        some = forward.batch(step, np.array([1, 2, 6]))
        for name, values in expected[step].items():
            assert (found[name] == values).all()
            assert (some[name] == values[[1, 2, 6]]).all()
    # The order of the sources in the config is not the order of anything.
    turned = dataclasses.replace(corpus, sources=corpus.sources[::-1])
    assert turned.fingerprint == corpus.fingerprint
    for step in steps:
        assert (Batches(turned, 8, 16, seed=7).batch(step)["tokens"] == expected[step]["tokens"]).all()


def test_without_a_mixture_sources_are_read_as_they_are_long(corpus: Corpus) -> None:
    corpus = dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, mixture=()))
    batches = Batches(corpus, 1000, 16, seed=0)
    share = {name: size / sum(SIZES.values()) for name, size in SIZES.items()}
    assert batches.mixture.shares(0) == pytest.approx(share)
    epochs = batches.epochs(50)
    assert max(epochs) - min(epochs) < 0.05 * max(epochs)


def test_too_many_epochs_are_refused(corpus: Corpus) -> None:
    def check(common: float | None, **own: float) -> None:
        sources = tuple(dataclasses.replace(one, max_epochs=own.get(one.name)) for one in corpus.data.sources)
        data = dataclasses.replace(corpus.data, sources=sources, max_epochs=common)
        Batches(dataclasses.replace(corpus, data=data), 24, 16, seed=0).check_epochs(12)

    web, code, books = Batches(corpus, 24, 16, seed=0).epochs(12)
    assert web < 1 < code < books
    check(None)
    check(1.0, code=99, books=99)
    check(books)
    with pytest.raises(ConfigError, match=r"books: .* epochs in 12 steps, more than its max_epochs of 3: it has 333"):
        check(3)
    with pytest.raises(ConfigError, match=r"web: .* more than its max_epochs of 0\.1"):
        check(None, web=0.1)


def test_a_pinned_batch_of_a_mixture(corpus: Corpus) -> None:
    """A change here changes the data of every run that is resumed."""
    batches = Batches(corpus, 4, 8, seed=42)
    found = [[(row.source, row.epoch, *row.spans[0]) for row in batches.rows(step)] for step in (5, 100)]
    assert found == [
        [(0, 0, 1197, 8), (1, 0, 308, 8), (0, 0, 2045, 8), (2, 0, 119, 8)],
        [(2, 5, 327, 8), (2, 5, 95, 8), (0, 0, 1821, 8), (2, 5, 279, 8)],
    ]
