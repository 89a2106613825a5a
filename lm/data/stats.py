"""What the documents of a corpus are like, and what a run makes of them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.data.batches import Batches
from lm.data.passages import passages
from lm.data.progress import Progress
from lm.data.scan import Place, places, scan
from lm.data.show import decode, one_line
from lm.data.stream import TokenStream

_SCANNED_TOKENS = 4 << 30  # of a larger corpus, every n-th shard is read
_STRETCH = 1 << 24  # of tokens, whose documents are looked up at once
_HASHES = 1 << 22  # of documents that are kept
_LONGEST = 5
_FREQUENT = 10
_FIRST_TOKENS = 24
_SAMPLED_TOKENS = 1 << 21  # of batches
_SAMPLED_STEPS = 16
_BAR = 30


@dataclass(frozen=True)
class Document:
    source: str
    document: int
    tokens: int
    first: str
    """The words that it begins with."""


@dataclass(frozen=True)
class Lengths:
    """Documents by their tokens, specials included: entry i of each list is of 2^i up to 2^(i+1) tokens."""

    documents: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Copies:
    """Documents that are the same, token by token, as an earlier one of the same source, or in all of any."""

    looked_at: int
    """Documents: all that were scanned, or those whose hash is in the part of the hashes that was kept."""
    documents: int
    tokens: int
    share: float
    """Of the documents."""
    share_of_tokens: float


@dataclass(frozen=True)
class Rows:
    """What rows of a run are like, from some of its batches."""

    sampled: int
    tokens: int
    masked: int
    """Of the tokens, those whose target is not trained on."""
    padding: int
    begun: int
    """Documents that begin in these rows."""
    cut: int
    """Of them, those that do not end in the row in which they begin."""
    longer: int
    """Of them, those that no row could hold."""


@dataclass(frozen=True)
class SourceStats:
    name: str
    documents: int
    tokens: int
    bytes: int
    heldout_documents: int
    heldout_tokens: int
    lengths: Lengths
    longest: list[Document]
    copies: Copies
    rows: Rows
    rows_planned: int
    epochs_planned: float


@dataclass(frozen=True)
class Stats:
    sources: list[SourceStats]
    lengths: Lengths
    copies: Copies
    most_copied: Document | None
    most_copied_times: int
    rows: Rows
    packing: str
    sequence_length: int
    steps: int
    rows_planned: int
    phases: list[tuple[int, dict[str, float]]]
    """First step, and the share of each source from there on."""
    scanned_tokens: int
    """Of the training tokens; ids and copies were counted in these."""
    tokens: int
    vocabulary: int
    never_seen: int
    """Ids."""
    frequent: list[tuple[str, float]]
    """The most frequent ids and their share of the tokens."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def stats(batches: Batches, steps: int, processes: int, progress: Progress) -> Stats:
    """Of what is trained on, for a run of so many steps.

    Lengths are those of all documents. Ids and copies are counted in all tokens of up to 4 billion; of more, in evenly
    chosen shards. What packing does is counted in rows of batches that are spread evenly over the run.
    """
    corpus = batches.corpus
    chosen = _evenly(places(corpus, "train"))
    scanned = _Scanned(len(corpus.sources), corpus.tokenizer.vocab_size)
    look = functools.partial(_look, vocabulary=corpus.tokenizer.vocab_size)
    for place, found in scan(look, chosen, processes, "reading tokens", progress):
        scanned.add(place, found)
    copies, whole, most = scanned.copies()
    rows = _rows(batches, steps)
    counts = batches.mixture.counts(steps * batches.batch_size)
    sources, epochs = [], batches.epochs(steps)
    for number, (one, stream) in enumerate(zip(corpus.sources, batches.streams, strict=True)):
        lengths, longest = _lengths(stream)
        manifest = one.manifest
        sources.append(
            SourceStats(
                name=one.title,
                documents=manifest.documents("train"),
                tokens=manifest.tokens("train"),
                bytes=manifest.text_bytes("train"),
                heldout_documents=manifest.documents("heldout"),
                heldout_tokens=manifest.tokens("heldout"),
                lengths=lengths,
                longest=[_document(batches, number, position, size) for size, position in longest],
                copies=copies[number],
                rows=rows[number],
                rows_planned=counts[one.name],
                epochs_planned=epochs[number],
            )
        )
    times, source, position, size = most
    ids = scanned.ids
    return Stats(
        sources=sources,
        lengths=Lengths(*(_sum([getattr(one.lengths, name) for one in sources]) for name in ("documents", "tokens"))),
        copies=whole,
        most_copied=_document(batches, source, position, size) if times > 1 else None,
        most_copied_times=times,
        rows=Rows(*(sum(values) for values in zip(*map(dataclasses.astuple, rows), strict=True))),
        packing=corpus.data.packing,
        sequence_length=batches.sequence_length,
        steps=steps,
        rows_planned=steps * batches.batch_size,
        phases=[(step, _shares(weights)) for step, weights in corpus.phases],
        scanned_tokens=int(ids.sum()),
        tokens=corpus.tokens("train"),
        vocabulary=len(ids),
        never_seen=int((ids == 0).sum()),
        frequent=[
            (corpus.tokenizer.piece(i), float(ids[i] / ids.sum()))
            for i in np.argsort(-ids, kind="stable")[:_FREQUENT].tolist()
            if ids[i]
        ],
    )


def lines(found: Stats) -> Iterator[str]:
    """What `stats` found, as a person reads it."""
    several = len(found.sources) > 1
    width = max(len(one.name) for one in found.sources) if several else 4
    yield (
        f"{'':<{width}} {'documents':>13} {'tokens':>17} {'bytes':>17} {'bytes/token':>12} {'held-out tokens':>16} "
        f"{'copies':>8}"
    )
    total = (
        sum(one.documents for one in found.sources),
        found.tokens,
        sum(one.bytes for one in found.sources),
        sum(one.heldout_tokens for one in found.sources),
    )
    table = [(one.name, one.documents, one.tokens, one.bytes, one.heldout_tokens, one.copies) for one in found.sources]
    for name, documents, tokens, size, heldout, copies in [
        *table,
        *([("all", *total, found.copies)] if several else []),
    ]:
        yield (
            f"{name:<{width}} {documents:>13,} {tokens:>17,} {size:>17,} {size / tokens:>12.3f} {heldout:>16,} "
            f"{_percent(copies.share):>8}"
        )
    yield ""
    yield f"{'tokens of a document':>24}   {'documents':<{_BAR + 21}} share of the tokens"
    by_documents, by_tokens = found.lengths.documents, found.lengths.tokens
    first = next(i for i, count in enumerate(by_documents) if count)
    for i in range(first, len(by_documents)):
        share = by_documents[i] / sum(by_documents)
        bar = "█" * math.ceil(_BAR * by_documents[i] / max(by_documents))
        place = f"{1 << i:,}–{(2 << i) - 1:,}" if i else "1"
        of_tokens = _percent(by_tokens[i] / found.tokens)
        yield f"{place:>24}   {by_documents[i]:>12,} {_percent(share):>7} {bar:<{_BAR}} {of_tokens:>7}"
    longest = heapq.nlargest(_LONGEST, (one for each in found.sources for one in each.longest), lambda one: one.tokens)
    yield "longest documents:"
    for one in longest:
        yield f"  {one.tokens:>12,} tokens: {one.source}, document {one.document:,}: {one_line(one.first)}…"
    yield ""
    yield from _scanned_lines(found)
    yield ""
    yield from _plan_lines(found, width)


def _scanned_lines(found: Stats) -> Iterator[str]:
    of_all = (
        ""
        if found.scanned_tokens == found.tokens
        else (f" (counted in {found.scanned_tokens / found.tokens:.1%} of the tokens, in shards evenly chosen)")
    )
    never = found.never_seen / found.vocabulary
    yield f"ids never seen: {found.never_seen:,} of {found.vocabulary:,}, {_percent(never)}{of_all}"
    yield f"most frequent: {', '.join(f'{one_line(piece)!r} {_percent(share)}' for piece, share in found.frequent)}"
    copies = found.copies
    compared = " that were compared" if sum(one.documents for one in found.sources) > copies.looked_at else ""
    yield (
        f"copies of an earlier document: {copies.documents:,} of {copies.looked_at:,}{compared}, "
        f"{_percent(copies.share)} of the documents and {_percent(copies.share_of_tokens)} of their tokens{of_all}"
    )
    if found.most_copied is not None:
        one = found.most_copied
        yield (
            f"  the most frequent, {found.most_copied_times:,} times: {one.source}, document {one.document:,}: "
            f"{one_line(one.first)}…"
        )


def _plan_lines(found: Stats, width: int) -> Iterator[str]:
    several = len(found.sources) > 1
    yield f"a run of {found.steps:,} steps, {found.rows_planned:,} rows of {found.sequence_length:,} tokens:"
    yield (
        f"  {'':<{width}} {'share of rows':>13} {'epochs':>9} {'masked':>8} {'padding':>8} {'cut documents':>14} "
        f"{'longer than a row':>18}"
    )
    table = [(one.name, one.rows_planned, f"{one.epochs_planned:.3f}", one.rows) for one in found.sources]
    for name, planned, epochs, rows in [*table, *([("all", found.rows_planned, "", found.rows)] if several else [])]:
        share = _percent(planned / found.rows_planned)
        yield (
            f"  {name:<{width}} {share:>13} {epochs:>9} {_share(rows.masked, rows.tokens):>8} "
            f"{_share(rows.padding, rows.tokens + rows.padding):>8} {_share(rows.cut, rows.begun):>14} "
            f"{_share(rows.longer, rows.begun):>18}"
        )
    yield f"  masked, padding and cut: in {found.rows.sampled:,} rows of packing {found.packing}, spread over the run"
    if len(found.phases) > 1:
        for step, shares in found.phases:
            yield f"  from step {step:,}: {', '.join(f'{name} {_percent(share)}' for name, share in shares.items())}"


@dataclass(frozen=True)
class _Look:
    """What a shard holds: how often each id, and of each document hash and first position."""

    ids: np.ndarray
    hashes: np.ndarray
    starts: np.ndarray


def _look(place: Place, vocabulary: int) -> _Look:
    """Reads a shard."""
    reader = place.reader()
    ids = np.zeros(vocabulary, np.int64)
    hashes, starts = np.zeros((2, place.shard.documents), np.uint64)
    count, done, digest = 0, 0, hashlib.blake2b(digest_size=8)
    for index in range(place.shard.records):
        record = reader.read(index)
        ids += np.bincount(record.tokens, minlength=vocabulary)
        raw, size, begin = memoryview(record.tokens.tobytes()), record.tokens.itemsize, 0
        for start in record.starts.tolist():
            digest.update(raw[begin * size : start * size])
            if count:
                hashes[count - 1] = int.from_bytes(digest.digest(), "little")
            starts[count] = done + start
            count, begin, digest = count + 1, start, hashlib.blake2b(digest_size=8)
        digest.update(raw[begin * size :])
        done += len(record.tokens)
    hashes[count - 1] = int.from_bytes(digest.digest(), "little")
    return _Look(ids, hashes, starts.astype(np.int64))


class _Scanned:
    """Sums over shards, in bounded memory.

    When there are too many documents only those are kept whose hash is divisible by two, by four, and so on: of a
    document then either all copies are known, or none (Gibbons, "Distinct Sampling", VLDB 2001).
    """

    def __init__(self, sources: int, vocabulary: int) -> None:
        self.ids = np.zeros(vocabulary, np.int64)
        self._divisor = 1
        self._kept: list[list[np.ndarray]] = [[] for _ in range(sources)]
        """Of each source uint64 [3, n]: hash, tokens, position."""

    def add(self, place: Place, look: _Look) -> None:
        self.ids += look.ids
        sizes = np.diff(look.starts, append=place.shard.tokens)
        found = np.stack([look.hashes, sizes.astype(np.uint64), (look.starts + place.begin).astype(np.uint64)])
        self._kept[place.source].append(self._of_divisor(found))
        while sum(one.shape[1] for source in self._kept for one in source) > _HASHES:
            self._divisor *= 2
            self._kept = [[self._of_divisor(np.concatenate(source, axis=1))] if source else [] for source in self._kept]

    def copies(self) -> tuple[list[Copies], Copies, tuple[int, int, int, int]]:
        """Of each source, of all; and of the document with most copies: times, source, position, tokens."""
        sources = [np.concatenate([np.zeros((3, 0), np.uint64), *source], axis=1) for source in self._kept]
        of = np.repeat(np.arange(len(sources)), [one.shape[1] for one in sources])
        whole = np.concatenate(sources, axis=1)
        most = (0, 0, 0, 0)
        if whole.shape[1]:
            _, first, times = np.unique(whole[0], return_index=True, return_counts=True)
            best = int(times.argmax())
            alike = np.flatnonzero(whole[0] == whole[0, first[best]])
            at = alike[np.lexsort((whole[2, alike], of[alike]))[0]]  # shards are done in any order
            most = int(times[best]), int(of[at]), int(whole[2, at]), int(whole[1, at])
        return [_copies(one) for one in sources], _copies(whole), most

    def _of_divisor(self, found: np.ndarray) -> np.ndarray:
        return found[:, found[0] % np.uint64(self._divisor) == 0]


def _copies(found: np.ndarray) -> Copies:
    count, tokens = found.shape[1], int(found[1].sum())
    _, first = np.unique(found[0], return_index=True)
    documents, copied = count - len(first), tokens - int(found[1, first].sum())
    return Copies(count, documents, copied, documents / max(count, 1), copied / max(tokens, 1))


def _evenly(where: Sequence[Place]) -> list[Place]:
    """All shards; of a corpus that is too large to be read, every n-th of each source, at least one."""
    total = sum(place.shard.tokens for place in where)
    if total <= _SCANNED_TOKENS:
        return list(where)
    chosen = []
    for source in sorted({place.source for place in where}):
        own = [place for place in where if place.source == source]
        count = math.ceil(len(own) * _SCANNED_TOKENS / total)
        chosen += [own[i] for i in np.unique(np.linspace(0, len(own) - 1, count).round().astype(int))]
    return chosen


def _lengths(stream: TokenStream) -> tuple[Lengths, list[tuple[int, int]]]:
    """Of all documents; and of the longest (tokens, position)."""
    documents, tokens = np.zeros((2, 63), np.int64)
    longest: list[tuple[int, int]] = []
    last = 0  # the document that began last
    for begin in range(0, stream.tokens, _STRETCH):
        stop = min(begin + _STRETCH, stream.tokens)
        found = stream.document_starts(begin, stop)
        if stop == stream.tokens:
            found = np.append(found, stop)
        edges = np.concatenate([[last], found]) if begin else found
        if len(edges) < 2:
            continue
        sizes, last = np.diff(edges), int(edges[-1])
        power = np.frexp(sizes)[1] - 1
        documents += np.bincount(power, minlength=63)
        np.add.at(tokens, power, sizes)
        top = np.argsort(-sizes, kind="stable")[:_LONGEST]
        longest = heapq.nlargest(_LONGEST, [*longest, *zip(sizes[top].tolist(), edges[top].tolist(), strict=True)])
    used = int(np.flatnonzero(documents).max()) + 1
    return Lengths(documents[:used].tolist(), tokens[:used].tolist()), longest


def _rows(batches: Batches, steps: int) -> list[Rows]:
    """By source, from rows that are spread evenly over the run."""
    length, size = batches.sequence_length, batches.batch_size
    chosen = np.unique(np.linspace(0, steps - 1, min(_SAMPLED_STEPS, steps)).round().astype(int)).tolist()
    each = min(size, max(1, _SAMPLED_TOKENS // length // len(chosen)))
    within = np.unique(np.linspace(0, size - 1, each).round().astype(int))
    found = [Counter[str]() for _ in batches.streams]
    for step in chosen:
        batch = batches.batch(step, within)
        for row, (source, _, spans) in enumerate(batches.rows(step, within)):
            inside = batch["segments"][row] > 0
            found[source].update(
                sampled=1,
                tokens=int(inside.sum()),
                masked=int((inside & (batch["loss_mask"][row] == 0)).sum()),
                padding=int((~inside).sum()),
            )
            for start, count in spans:
                for one in passages(batches.streams[source], start, count):
                    if one.begins:
                        longer = not one.ends and _is_longer(batches, source, one.position)
                        found[source].update(begun=1, cut=not one.ends, longer=longer)
    return [Rows(**{field.name: one[field.name] for field in dataclasses.fields(Rows)}) for one in found]


def _is_longer(batches: Batches, source: int, position: int) -> bool:
    """Whether the document that begins there has more tokens than a row."""
    stream = batches.streams[source]
    stop = position + batches.sequence_length + 1
    return stop <= stream.tokens and not len(stream.document_starts(position + 1, stop))


def _document(batches: Batches, source: int, position: int, tokens: int) -> Document:
    stream, corpus = batches.streams[source], batches.corpus
    ids = stream.read(position, min(tokens, _FIRST_TOKENS))[0].tolist()
    first = decode(corpus.tokenizer, ids[1:] if ids[0] == corpus.tokenizer.bos_id else ids)
    return Document(corpus.sources[source].title, stream.document(position), tokens, first)


def _shares(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name or "data": weight / total for name, weight in weights.items()}


def _sum(parts: list[list[int]]) -> list[int]:
    whole = np.zeros(max(map(len, parts)), np.int64)
    for part in parts:
        whole[: len(part)] += part
    return whole.tolist()


def _share(part: int, whole: int) -> str:
    return _percent(part / whole) if whole else "-"


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.1%}"
