from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lm.data import order
from lm.data.batches import Batch, Batches, Row
from lm.data.config import DataConfig
from lm.data.corpus import open_corpus
from lm.data.order import BestFit, Split
from lm.data.packing import best_fit
from lm.data.stream import TokenStream
from lm.data.tokenizers import BytesTokenizer

Write = Callable[..., Path]


def obvious(lengths: Sequence[int], cut: Sequence[bool], rows: int, capacity: int) -> list[tuple[int, int, int, int]]:
    """Looks at every row for every piece."""
    room = [capacity] * rows
    placed, rest, left = [], list(lengths), []

    def place(piece: int, row: int, tokens: int) -> None:
        placed.append((row, piece, lengths[piece] - rest[piece], tokens))
        room[row] -= tokens
        rest[piece] -= tokens

    for piece in range(len(lengths)):
        while rest[piece] >= capacity:
            place(piece, room.index(capacity), capacity)

    def order(piece: int) -> tuple[bool, int]:
        return cut[piece] or lengths[piece] > capacity, -rest[piece]

    for piece in sorted(range(len(lengths)), key=order):
        fits = [(room[row], row) for row in range(rows) if room[row] >= rest[piece] > 0]
        if fits:
            place(piece, min(fits)[1], rest[piece])
        else:
            left.append(piece)
    rooms = sorted(range(rows), key=lambda row: -room[row])
    for piece in sorted(left, key=lambda piece: -rest[piece]):
        while rest[piece]:
            row = next(row for row in rooms if room[row])
            place(piece, row, min(room[row], rest[piece]))
    return placed


def fitted(groups: Sequence[Sequence[int]], cut: Sequence[Sequence[bool]], rows: Sequence[int], capacity: int) -> Any:
    """What `best_fit` says of each group, all at once, as `obvious` says it."""
    sizes = [len(lengths) for lengths in groups]
    number = np.repeat(np.arange(len(groups)), sizes)
    placed = best_fit(np.concatenate(groups), np.concatenate(cut), number, np.array(rows), capacity)
    found: list[list[tuple[int, ...]]] = [[] for _ in groups]
    for piece, row, offset, length in np.stack(placed, axis=1).tolist():
        group = int(number[piece])
        found[group].append((row, piece - sum(sizes[:group]), offset, length))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_is_the_obvious_one(seed: int) -> None:
    draw = np.random.default_rng(seed)
    capacity = int(draw.choice([1, 7, 16, 100]))
    groups, cuts, rows = [], [], []
    for _ in range(int(draw.choice([1, 2, 9]))):
        groups.append(draw.integers(1, draw.choice([2, capacity + 2, 3 * capacity + 2]), draw.integers(1, 60)))
        cuts.append(draw.random(len(groups[-1])) < draw.choice([0, 0.1, 1]))
        rows.append(-(-int(groups[-1].sum()) // capacity) + int(draw.choice([0, 0, 1, 5])))
    for placed, lengths, cut, count in zip(fitted(groups, cuts, rows, capacity), groups, cuts, rows, strict=True):
        assert sorted(placed) == sorted(obvious(lengths.tolist(), cut.tolist(), count, capacity))
        filled = np.zeros(count, int)
        seen = [np.zeros(length, int) for length in lengths]
        for row, piece, offset, length in placed:
            filled[row] += length
            seen[piece][offset : offset + length] += 1
        assert all((one == 1).all() for one in seen)
        assert filled.max() <= capacity


def test_what_fits_is_never_cut() -> None:
    draw = np.random.default_rng(0)
    pieces = []
    for _ in range(64):  # rows of one large piece and small change
        large = int(draw.integers(60, 100))
        pieces += [large] + [1] * (100 - large)
    (placed,) = fitted([draw.permutation(pieces)], [np.zeros(len(pieces), bool)], [64], 100)
    assert len(placed) == len(pieces)


def realistic(tokens: int) -> np.ndarray:
    """Documents as of the web: half below 500 tokens, a few of many thousands."""
    lengths = np.random.default_rng(0).lognormal(np.log(500), 1.2, tokens // 500).astype(int) + 2
    return lengths[: np.searchsorted(np.cumsum(lengths), tokens)]


def cuts(stream: TokenStream, order: Split | BestFit, rows: range) -> tuple[int, int]:
    """Documents that do not lie whole in one row although one could hold them; all documents that begin in `rows`."""
    spans = order.spans(rows)
    starts = stream.document_starts(0, stream.tokens)
    ends = np.append(starts[1:], stream.tokens)
    first = np.searchsorted(starts, spans.start, side="right") - 1
    last = np.searchsorted(starts, spans.start + spans.length, side="left") - 1
    cut = set(first[spans.start > starts[first]]) | set(last[spans.start + spans.length < ends[last]])
    met = {document for a, b in zip(first, last, strict=True) for document in range(a, b + 1)}
    short = set(np.flatnonzero(ends - starts <= order.length).tolist())
    return len(cut & short), len(met & short)


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_few_documents_are_cut(write_data: Write, length: int) -> None:
    lengths = realistic(512 * length + length // 2)
    folder = write_data([[np.full(n, 1) for n in lengths]])
    stream = TokenStream(folder, "train")
    packed = BestFit(stream, length, "key")
    cut, all_of_them = cuts(stream, packed, range(packed.rows_per_epoch))
    split_cut, _ = cuts(stream, Split(stream, length, "key"), range(packed.rows_per_epoch))
    assert all_of_them > 0.45 * len(lengths)
    assert cut < 0.003 * all_of_them + 2
    assert cut < 0.02 * split_cut + 2


@pytest.mark.parametrize("long", [True, False])
def test_what_fits_is_not_cut_at_the_edge_of_a_group(write_data: Write, long: bool) -> None:
    """If some document of the group is cut anyway; else one is, at each edge."""
    draw = np.random.default_rng(0)
    sizes = [int(draw.integers(1, 12)) for _ in range(6000)]
    if long:
        sizes[::20] = [int(draw.integers(33, 60)) for _ in sizes[::20]]
    stream = TokenStream(write_data([[np.full(n, 1) for n in sizes]]), "train")
    packed = BestFit(stream, 32, "key")
    cut, _ = cuts(stream, packed, range(packed.rows_per_epoch))
    edges = packed.rows_per_epoch // 16
    assert edges > 50
    assert cut <= 2 if long else 0.5 * edges < cut <= edges + 1


# The order of rows

ODD_SIZES = [1, 5, 16, 17, 63, 64, 65, 128, 400, 16 * 12, 16 * 12 + 4, 16 * 13, 3000]


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 4 rows, and 3 groups that are shuffled together."""
    monkeypatch.setattr(order, "_GROUP", 4)
    monkeypatch.setattr(order, "_GROUPS", 3)


def check_epoch(stream: TokenStream, packed: BestFit, epoch: int, group: int) -> list[int]:
    """Every token once, full rows but in the last group, and `row_with`. Gives where each row begins."""
    count, tokens = packed.rows_per_epoch, stream.tokens
    assert count == -(-tokens // packed.length)
    spans = packed.spans(range(epoch * count, (epoch + 1) * count))
    seen, row_of = np.zeros(tokens, int), np.zeros(tokens, int)
    filled = np.bincount(spans.row, spans.length, count)
    starts = set(stream.document_starts(0, tokens).tolist())
    for row, start, length in np.stack(spans, axis=1).tolist():
        assert length > 0
        assert start + length <= tokens
        assert not starts & set(range(start + 1, start + length))  # of one document
        seen[start : start + length] += 1
        row_of[start : start + length] = row
    assert (seen == 1).all()
    assert filled.max() <= packed.length
    assert (filled < packed.length).sum() <= group
    for position in range(0, tokens, max(1, tokens // 50)):
        assert packed.row_with(epoch, position) == row_of[position]
    return spans.start[np.unique(spans.row, return_index=True)[1]].tolist()


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("tokens", ODD_SIZES)
@pytest.mark.parametrize("longest", [3, 16, 40, 500])
def test_every_token_once_in_an_epoch(write_data: Write, tokens: int, longest: int) -> None:
    draw = np.random.default_rng(tokens)
    ends = np.cumsum(draw.integers(1, longest + 1, tokens))
    documents = np.split(np.arange(tokens) % 258, ends[ends < tokens])
    half = len(documents) // 2
    stream = TokenStream(write_data([documents[:half], documents[half:]] if half else [documents]), "train")
    packed = BestFit(stream, 16, "key")
    orders = [check_epoch(stream, packed, epoch, 4) for epoch in (0, 1, 10**9)]
    if tokens > 100:
        assert orders[0] != orders[1] != orders[2]
    whole = packed.spans(range(2 * packed.rows_per_epoch))
    for index in draw.integers(0, 2 * packed.rows_per_epoch, 10).tolist():
        (one,) = ([s for s in np.stack(whole, axis=1).tolist() if s[0] == index] for _ in range(1))
        fresh = BestFit(stream, 16, "key").spans([index])
        assert np.stack(fresh, axis=1).tolist() == [[0, start, length] for _, start, length in one]


def test_groups_and_blocks_of_their_real_size(write_data: Write) -> None:
    draw = np.random.default_rng(0)
    tokens = 2 * (2 * 64 * 128 + 64 + 5) - 1  # two blocks, a group and some rows; the last row is not full
    ends = np.cumsum(draw.integers(1, 8, tokens))
    stream = TokenStream(write_data([np.split(np.zeros(tokens, int), ends[ends < tokens])]), "train")
    packed = BestFit(stream, 2, "key")
    check_epoch(stream, packed, 0, 1)
    # The rows of a batch are from all over the stream.
    spans = packed.spans(range(1000))
    starts = spans.start[np.unique(spans.row, return_index=True)[1]]
    assert starts.max() - starts.min() > tokens // 4
    assert (np.abs(np.diff(starts)) < 128).mean() < 0.05


@pytest.mark.usefixtures("small_groups")
def test_few_groups_are_kept(write_data: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_SPANS_KEPT", 50)
    monkeypatch.setattr(order, "_AT_ONCE", 2)
    stream = TokenStream(write_data([[np.full(5, 1)] * 400]), "train")
    packed, whole = BestFit(stream, 16, "key"), BestFit(stream, 16, "key").spans(range(120))
    for index in [*range(120), *range(119, -1, -7)]:
        found = packed.spans([index])
        assert found.start.tolist() == whole.start[whole.row == index].tolist()
        assert found.length.tolist() == whole.length[whole.row == index].tolist()
        assert sum(len(one.start) for one in packed.fits._kept.values()) <= 50


# Batches


def reference(stream: list[tuple[int, bool]], rows: list[Row], length: int, attention: str) -> Batch:
    """One token at a time."""
    token_bytes = BytesTokenizer().token_bytes
    names = ("tokens", "targets", "segments", "positions", "loss_mask")
    found: dict[str, list[list[int]]] = {name: [] for name in names}
    sizes = []
    for row in rows:
        values: dict[str, list[int]] = {name: [] for name in names}
        segment = position = size = 0
        for start, count in row.spans:
            for place in range(start, start + count):
                token, begins = stream[place % len(stream)]
                target, target_begins = stream[(place + 1) % len(stream)]
                if segment == 0 or (attention == "document" and (begins or place == start)):
                    segment, position = segment + 1, 0
                for name, value in zip(names, (token, target, segment, position, not target_begins), strict=True):
                    values[name].append(value)
                size += 0 if target_begins else int(token_bytes[target])
                position += 1
        for name in names:
            found[name].append(values[name] + [0] * (length - len(values[name])))
        sizes.append(size)
    batch = {name: np.array(found[name], np.int32) for name in names}
    batch["loss_mask"] = batch["loss_mask"].astype(np.float32)
    return batch | {"bytes": np.array(sizes, np.int32)}


@pytest.mark.usefixtures("small_records", "small_groups")
@pytest.mark.parametrize("attention", ["document", "row"])
@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("length", [1, 5, 16, 100])
def test_batches_equal_the_reference(write_data: Write, packing: str, attention: str, length: int) -> None:
    for seed in range(4):
        draw = np.random.default_rng(seed)
        shards = [
            [draw.integers(0, 258, int(draw.choice([1, 2, 7, 15, 16, 32, 200]))) for _ in range(draw.integers(1, 12))]
            for _ in range(draw.integers(1, 4))
        ]
        stream = [(int(t), i == 0) for shard in shards for document in shard for i, t in enumerate(document)]
        corpus = open_corpus(write_data(shards, name=f"{seed}"), DataConfig(packing=packing, attention=attention))
        batches = Batches(corpus, 3, length, seed)
        counted = 0
        steps = -(-batches.orders[0].rows_per_epoch // 3)
        for step in [*range(steps), 10**6, 10**15]:
            found, wanted = batches.batch(step), reference(stream, batches.rows(step), length, attention)
            assert list(found) == list(wanted)
            for name, values in wanted.items():
                assert found[name].dtype == values.dtype, name
                assert (found[name] == values).all(), name
            for some in (slice(1, 3), np.array([0, 2])):
                part = batches.batch(step, some)
                assert all((part[name] == values[some]).all() for name, values in wanted.items())
            if step < steps:
                inside = [row.epoch == 0 for row in batches.rows(step)]
                counted += int(found["loss_mask"][inside].sum())
        assert counted == sum(not begins for _, begins in stream)


def test_a_cut_document_goes_on_where_it_was_cut(write_data: Write) -> None:
    folder = write_data([[np.arange(100, 120), np.arange(7)]])
    batches = Batches(open_corpus(folder, DataConfig(packing="best_fit")), 3, 10, seed=0)
    batch, rows = batches.batch(0), batches.rows(0)
    assert sorted(start % 27 for row in rows for start, _ in row.spans)
    for number, row in enumerate(rows):
        column = 0
        for start, count in row.spans:
            last = column + count - 1
            ends = start + count in (20, 27)
            assert batch["loss_mask"][number, last] == (not ends)
            if not ends:
                assert batch["targets"][number, last] == batch["tokens"][number, last] + 1
            assert batch["positions"][number, column : last + 1].tolist() == list(range(count))
            column += count


def test_pinned_rows_of_best_fit(write_data: Write) -> None:
    """A change here changes the data of every run that is resumed."""
    documents = [np.full(n, n) for n in (3, 9, 1, 20, 4, 4, 5, 2, 8, 7, 11, 6)]
    batches = Batches(open_corpus(write_data([documents]), DataConfig(packing="best_fit")), 4, 8, seed=42)
    found = [row.spans for row in batches.rows(1)]
    assert found == [[(63, 8)], [(12, 1), (56, 7)], [(11, 1), (41, 5), (46, 2)], [(33, 4), (37, 4)]]
