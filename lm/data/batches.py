"""The batch of step k as a pure function of (data, seed, k).

Step k holds rows k*B to k*B + B - 1 of the run, or later ones where batches are left out (`lm.data.skips`). Which
source a row is from, and the how-manieth row of that source it is, says `mixture`; which tokens that one holds,
`order`. No state, so any step is reached at once and on any number of hosts.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.data.corpus import Corpus
from lm.data.order import Order, Spans, make_orders, spans_of
from lm.data.prefix import Prefixes
from lm.data.reading import Reads
from lm.data.skips import Skips
from lm.data.stream import Shelf, TokenStream, unmark
from lm.errors import ConfigError, DataError

Batch = dict[str, np.ndarray]

Rows = slice | np.ndarray
"""Some of the rows of a batch, the array by index."""

ALL_ROWS = slice(None)

_AHEAD_TOKENS = 1 << 21  # of batches whose places are found at once


class Row(NamedTuple):
    """Where the tokens of a row are from."""

    source: int
    """Of the corpus, by its place there."""
    epoch: int
    spans: list[tuple[int, int]]
    """(start, length) in the stream of the source."""


class _Ahead(NamedTuple):
    """The places of some rows in batches that follow each other."""

    rows: Rows
    first: int
    places: list[tuple[np.ndarray, Spans]]

    @property
    def stop(self) -> int:
        return self.first + len(self.places)


class Batches:
    """Shuffled batches of what is trained on.

    A batch holds, for B rows of S tokens:
        tokens     int32 [B, S]
        targets    int32 [B, S]    the tokens that follow
        segments   int32 [B, S]    1, 2, ... by document within the row; 0 for padding
        positions  int32 [B, S]    from 0 in each document, and from 0 at the start of the row
        loss_mask  float32 [B, S]  1 where the target continues the document of the token, else 0
        bytes      int32 [B]       bytes of text that the targets in the mask stand for
    and with `data.prefix_rate`
        prefix     int32 [B, S]    1 in a prefix, within which the mask is 0: see `lm.data.prefix`
    With `data.attention` "row" a row is one segment. Each token of a source is a target exactly once in an epoch of
    it; where it begins a document it is masked. Not for use by several threads at once: make one for each.
    """

    def __init__(
        self, corpus: Corpus, batch_size: int, sequence_length: int, seed: int, skips: Skips | None = None
    ) -> None:
        """Raises DataError if a source has nothing to train on."""
        _check_length(sequence_length)
        self.skips = skips or Skips()
        self.corpus, self.batch_size, self.sequence_length, self._seed = corpus, batch_size, sequence_length, seed
        self._rows = _Rows(corpus, "train", sequence_length)
        self._prefixes = Prefixes(corpus.data.prefix_rate, seed) if corpus.data.prefix_rate else None
        self.mixture = corpus.mixture(batch_size)
        keys = [f"{seed}/{one.name}" if one.name else f"{seed}" for one in corpus.sources]
        self.orders: Sequence[Order] = make_orders(corpus.data.packing, self.streams, sequence_length, keys)
        self._ahead = _Ahead(slice(0), 0, [])

    def __reduce__(self) -> tuple[Any, ...]:
        return Batches, (self.corpus, self.batch_size, self.sequence_length, self._seed, self.skips)

    @property
    def streams(self) -> list[TokenStream]:
        """Of each source."""
        return self._rows.streams

    @property
    def reads(self) -> Reads:
        """All that is read for batches goes through it."""
        return self._rows.reads

    def epochs(self, step: int) -> list[float]:
        """How often each source has been read before the step."""
        counts = self.mixture.counts(self.skips.batch(step) * self.batch_size)
        return [
            counts[one.name] / order.rows_per_epoch for one, order in zip(self.corpus.sources, self.orders, strict=True)
        ]

    def begins_phase(self, step: int) -> bool:
        """Whether the mixture is another one from this step on."""
        starts = [start for start, _ in self.corpus.phases]
        phase, before = (bisect.bisect_right(starts, self.skips.batch(one)) for one in (step, max(step - 1, 0)))
        return phase != before

    def check_epochs(self, steps: int) -> None:
        """Raises ConfigError when a run of so many steps would read a source more often than its `max_epochs`."""
        for one, epochs in zip(self.corpus.sources, self.epochs(steps), strict=True):
            limit = self.corpus.max_epochs(one.name)
            if limit is not None and epochs > limit:
                raise ConfigError(
                    f"{one.title}: {epochs:.2f} epochs in {steps} steps, more than its max_epochs of {limit:g}: it has "
                    f"{one.manifest.tokens('train'):,} tokens. Fewer steps, a smaller weight, or more data"
                )

    def batch(self, step: int, rows: Rows = ALL_ROWS) -> Batch:
        """The batch of the step, or the `rows` of it that this host needs."""
        made = self._rows.pack(*self.places(step, rows))
        if self._prefixes is None:
            return made
        return self._with_prefixes(made, self._numbers(step, rows), self._prefixes)

    def shapes(self) -> Batch:
        """Zeros in the shapes and types of a whole batch, without memory of their size: nothing is read."""
        nothing = np.zeros(0, np.int64)
        one = self._rows.pack(np.zeros(1, np.int64), Spans(nothing, nothing, nothing))
        if self._prefixes is not None:
            one = self._with_prefixes(one, np.zeros(1, np.int64), self._prefixes)
        return {name: np.broadcast_to(x[0] * 0, (self.batch_size, *x.shape[1:])) for name, x in one.items()}

    def places(self, step: int, rows: Rows = ALL_ROWS) -> tuple[np.ndarray, Spans]:
        """int64 [B] the source of each row, and the stretches of that source that are in it."""
        number, ahead = self.skips.batch(step), self._ahead
        if not (ahead.first <= number < ahead.stop and _same(ahead.rows, rows)):
            follows = number == ahead.stop and _same(ahead.rows, rows)
            self._ahead = ahead = self._work_ahead(number, 2 * len(ahead.places) if follows else 1, rows)
        return ahead.places[number - ahead.first]

    def rows(self, step: int, rows: Rows = ALL_ROWS) -> list[Row]:
        """What `places` says, row by row."""
        source, index = self.mixture.deal(self._numbers(step, rows))
        _, spans = self.places(step, rows)
        found = [
            Row(one, number // self.orders[one].rows_per_epoch, [])
            for one, number in zip(source.tolist(), index.tolist(), strict=True)
        ]
        for row, start, length in np.stack(spans, axis=1).tolist():
            found[row].spans.append((start, length))
        return found

    def rows_with(self, source: int, position: int, tokens: int, before: int) -> Iterator[tuple[int, int, int]]:
        """(step, row in it, tokens) of each row before step `before` that reads some of these tokens of a source."""
        order, stop = self.orders[source], position + tokens
        for epoch in range(int(self.epochs(before)[source]) + 1):
            at = position
            while at < stop:
                index = epoch * order.rows_per_epoch + order.row_with(epoch, at)
                _, start, length = order.spans([index])
                together = min(stop - at, int((length - (at - start) % order.stream.tokens).max()))
                row = self.mixture.rows(source, index)
                step = None if row is None else self.skips.step(row // self.batch_size)
                if row is not None and step is not None and step < before:
                    yield step, row % self.batch_size, together
                at += together

    def _work_ahead(self, first: int, count: int, rows: Rows) -> _Ahead:
        """The places in so many batches, or fewer where that would be much. As numpy is slow on few, it takes much
        less time than to find those of each; they are lost if others follow, so the first of them are few."""
        size = len(np.arange(self.batch_size)[rows])
        count = max(1, min(count, _AHEAD_TOKENS // max(1, size * self.sequence_length)))
        numbers = np.concatenate([self._rows_of(number, rows) for number in range(first, first + count)])
        source, index = self.mixture.deal(numbers)
        spans = spans_of(self.orders, source, index)
        places = []
        bounds = np.searchsorted(spans.row, np.arange(count + 1) * size)
        for i in range(count):
            row, start, length = (part[bounds[i] : bounds[i + 1]] for part in spans)
            places.append((source[i * size : (i + 1) * size], Spans(row - i * size, start, length)))
        return _Ahead(rows, first, places)

    def _with_prefixes(self, batch: Batch, numbers: np.ndarray, prefixes: Prefixes) -> Batch:
        inside, within = prefixes(batch["segments"], numbers)
        mask = (batch["loss_mask"] > 0) & ~within
        size = self._rows.count_bytes(batch["targets"], mask)
        return batch | {"prefix": inside.astype(np.int32), "loss_mask": mask.astype(np.float32), "bytes": size}

    def _numbers(self, step: int, rows: Rows) -> np.ndarray:
        """int64 [n] of the rows, counted through the run."""
        return self._rows_of(self.skips.batch(step), rows)

    def _rows_of(self, batch: int, rows: Rows) -> np.ndarray:
        return (batch * self.batch_size + np.arange(self.batch_size))[rows]


class Evaluation:
    """The windows of a split of all sources in order, from the start: each token is a target at most once.

    The last batch is filled up with rows of padding, whose loss mask is 0. Batches are as in `Batches`, and have

        source     int32 [B]       which of `sources` a row is of
    """

    def __init__(self, corpus: Corpus, split: str, batch_size: int, sequence_length: int) -> None:
        """Raises DataError if the split is empty."""
        _check_length(sequence_length)
        self._rows = _Rows(corpus, split, sequence_length)
        self._batch_size = batch_size
        self._ends = np.cumsum([-(-stream.tokens // sequence_length) for stream in self._rows.streams])

    @property
    def reads(self) -> Reads:
        """All that is read for batches goes through it."""
        return self._rows.reads

    @property
    def sources(self) -> list[str]:
        """What they are called, those of which the split has something."""
        return self._rows.titles

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._batch_size)

    def batch(self, index: int, rows: Rows = ALL_ROWS) -> Batch:
        """Batch `index` of `len(self)`, or `rows` of it."""
        window = np.arange(index * self._batch_size, (index + 1) * self._batch_size)[rows]
        there = np.flatnonzero(window < self._ends[-1])
        source = np.searchsorted(self._ends, window, side="right")
        begins = np.concatenate([[0], self._ends])
        start = (window - begins[source])[there] * self._rows.length
        tokens = np.array([stream.tokens for stream in self._rows.streams])[source[there]]
        batch = self._rows.pack(source, Spans(there, start, np.minimum(tokens - start, self._rows.length)))
        return batch | {"source": source.astype(np.int32)}


class _Rows:
    """Reads stretches of the streams of a split and makes rows of them."""

    def __init__(self, corpus: Corpus, split: str, sequence_length: int) -> None:
        shelf = Shelf()
        self.reads = shelf.reads
        self.streams: list[TokenStream] = []
        self.titles: list[str] = []
        for one in corpus.sources:
            if one.manifest.tokens(split) or len(corpus.sources) == 1:
                self.streams.append(TokenStream(one.directory, split, one.manifest, shelf, one.name))
                self.titles.append(one.title)
            elif split == "train":
                raise DataError(f"source {one.name}: {one.directory} has nothing to train on")
        if not self.streams:
            raise DataError(f"{corpus.directory}: the {split} split is empty; see data.holdout_fraction")
        self.length = sequence_length
        self._by_document = corpus.data.attention == "document"
        self._token_bytes = corpus.tokenizer.token_bytes

    def pack(self, source: np.ndarray, spans: Spans) -> Batch:
        """Rows of the streams number int [B] `source`, whose `spans` fill them from the left; the rest is padding."""
        count, length = len(source), self.length
        before = np.cumsum(spans.length) - spans.length
        begin = spans.row * length + before - before[np.searchsorted(spans.row, spans.row)]
        end = begin + spans.length
        # Of each span the last target too, which the next span then writes over.
        marked, last = np.zeros(count * length + 1, np.int32), np.empty(len(end), np.int32)
        streams = [self.streams[i] for i in source[spans.row].tolist()]
        places = zip(streams, spans.start.tolist(), begin.tolist(), end.tolist(), strict=True)
        for number, (stream, start, first, stop) in enumerate(places):
            stream.fill(start, marked[first : stop + 1])
            last[number] = marked[stop]
        following = marked[1:].copy()
        following[end - 1] = last
        shape = (count, length)
        inputs, begun = unmark(marked[:-1].reshape(shape))
        targets, ends = unmark(following.reshape(shape))
        begun.reshape(-1)[begin] = True
        mask, inside = ~ends, np.ones((1, 1), bool)
        if spans.length.sum() < count * length:
            edges = np.zeros(count * length + 1, np.int8)
            edges[begin] += 1
            edges[end] -= 1
            inside = np.cumsum(edges[:-1], dtype=np.int8).astype(bool).reshape(shape)
            inputs, targets, mask = inputs * inside, targets * inside, mask & inside
        if self._by_document:
            begun[:, 0] = True
            segments, positions = (part.reshape(shape) * inside for part in _documents(begun))
        else:
            whole = np.int32(1), np.arange(length, dtype=np.int32)
            segments, positions = (np.broadcast_to(x, shape) * inside for x in whole)
        return {
            "tokens": inputs,
            "targets": targets,
            "segments": segments,
            "positions": positions,
            "loss_mask": mask.astype(np.float32),
            "bytes": self.count_bytes(targets, mask),
        }

    def count_bytes(self, targets: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """int32 [B] bytes of text that the targets in the mask, [B, S] both, stand for."""
        return (self._token_bytes.take(targets) * mask).sum(axis=1, dtype=np.int32)


def _documents(begun: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B * S] the number of each token's document in its row, from 1, and the token's position in it, where
    documents begin at bool [B, S] and in each row's first place."""
    first = np.flatnonzero(begun).astype(np.int32)
    size = np.diff(first, append=np.int32(begun.size))
    number = np.arange(1, len(first) + 1) - np.searchsorted(first, first - first % begun.shape[1])
    # Much faster than to add up and to compare along rows.
    return np.repeat(number.astype(np.int32), size), np.arange(begun.size, dtype=np.int32) - np.repeat(first, size)


def _same(one: Rows, other: Rows) -> bool:
    if isinstance(one, slice) or isinstance(other, slice):
        return type(one) is type(other) and one == other
    return np.array_equal(one, other)


def _check_length(sequence_length: int) -> None:
    if sequence_length < 1:
        raise ValueError(f"sequence_length must be positive, got {sequence_length}")
