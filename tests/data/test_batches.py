import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from lm.data.batches import Batch, Batches, Evaluation
from lm.data.config import DataConfig
from lm.data.corpus import Corpus, open_corpus
from lm.data.skips import Skip, Skips
from lm.data.stream import TokenStream
from lm.data.tokenizers import BytesTokenizer
from lm.errors import DataError

Write = Callable[..., Path]
Stream = list[tuple[int, bool]]  # (token, does it begin a document)

LENGTHS = [1, 2, 5, 16, 33, 1000]


def reference(stream: Stream, starts: list[int], lengths: list[int], sequence_length: int) -> Batch:
    """One token at a time."""
    token_bytes = BytesTokenizer().token_bytes
    names = ("tokens", "targets", "segments", "positions", "loss_mask")
    rows: dict[str, list[list[float]]] = {name: [] for name in names}
    sizes = []
    for start, length in zip(starts, lengths, strict=True):
        row: dict[str, list[float]] = {name: [0] * sequence_length for name in names}
        segment = position = size = 0
        for t in range(length):
            token, begins = stream[(start + t) % len(stream)]
            target, target_begins = stream[(start + t + 1) % len(stream)]
            if t == 0 or begins:
                segment, position = segment + 1, 0
            row["tokens"][t], row["targets"][t] = token, target
            row["segments"][t], row["positions"][t] = segment, position
            row["loss_mask"][t] = 0 if target_begins else 1
            size += 0 if target_begins else int(token_bytes[target])
            position += 1
        for name in names:
            rows[name].append(row[name])
        sizes.append(size)
    batch = {name: np.array(rows[name], np.int32) for name in names}
    batch["loss_mask"] = batch["loss_mask"].astype(np.float32)
    return batch | {"bytes": np.array(sizes, np.int32)}


def same(one: Batch, other: Batch) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert one[name].shape == other[name].shape, name
        assert (one[name] == other[name]).all(), name


def random_data(write_data: Write, seed: int, name: str = "data") -> tuple[Path, Stream]:
    """Documents of one token, of a record, of many records, and edges on records and shards."""
    draw = np.random.default_rng(seed)
    shards = [
        [draw.integers(0, 258, int(draw.choice([1, 2, 7, 15, 16, 32, 200]))) for _ in range(draw.integers(1, 12))]
        for _ in range(draw.integers(1, 4))
    ]
    stream = [(int(t), i == 0) for shard in shards for document in shard for i, t in enumerate(document)]
    return write_data(shards, shards, name), stream


@pytest.mark.usefixtures("small_records")
@pytest.mark.parametrize("length", LENGTHS)
def test_batches_equal_the_reference(write_data: Write, length: int) -> None:
    for seed in range(8):
        folder, stream = random_data(write_data, seed, f"{seed}")
        batches = Batches(open_corpus(folder), 3, length, seed)
        for step in [*range(2 * batches.orders[0].rows_per_epoch // 3 + 2), 10**6, 10**15, -1]:
            _, starts, lengths = batches.places(step)[1]
            same(batches.batch(step), reference(stream, starts.tolist(), lengths.tolist(), length))


@pytest.mark.usefixtures("small_records")
@pytest.mark.parametrize("length", LENGTHS)
def test_evaluation_equals_the_reference(write_data: Write, length: int) -> None:
    for seed in range(8):
        folder, stream = random_data(write_data, seed, f"{seed}")
        evaluation = Evaluation(open_corpus(folder), "heldout", 3, length)
        starts = [*range(0, len(stream), length)]
        assert len(evaluation) == -(-len(starts) // 3)
        starts += [0] * (3 * len(evaluation) - len(starts))
        last = evaluation.batch(len(evaluation) - 1)
        same(evaluation.batch(len(evaluation) - 1, np.array([0, 2])), {n: last[n][[0, 2]] for n in last})
        weights = texts = 0.0
        for i in range(len(evaluation)):
            batch = evaluation.batch(i)
            rows = range(3 * i, 3 * i + 3)
            places = [starts[r] for r in rows]
            lengths = [max(0, min(length, len(stream) - r * length)) for r in rows]
            of_source = {"source": np.array([int(r >= -(-len(stream) // length)) for r in rows], np.int32)}
            same(batch, reference(stream, places, lengths, length) | of_source)
            same(evaluation.batch(i, slice(1, 3)), {name: batch[name][1:3] for name in batch})
            weights += batch["loss_mask"].sum()
            texts += batch["bytes"].sum()
        assert weights == sum(not begins for _, begins in stream)
        assert texts == sum(token < 256 and not begins for token, begins in stream)


def test_evaluation_of_several_sources_is_that_of_each_in_turn(write_texts: Callable[..., Corpus]) -> None:
    held = {
        "one": ["of 16 tokens..", "of 16 tokens.."],
        "none": [],
        "two": ["short"],
        "three": ["longer than rows are"],
    }
    corpus = write_texts({name: ["text"] for name in held}, held)
    wanted: dict[str, list[np.ndarray]] = {}
    for source in (one for one in corpus.sources if held[one.name]):
        evaluation = Evaluation(dataclasses.replace(corpus, sources=(source,)), "heldout", 1, 8)
        for i in range(len(evaluation)):
            for name, values in evaluation.batch(i).items():
                wanted.setdefault(name, []).append(values[0])
    evaluation = Evaluation(corpus, "heldout", 3, 8)
    batches = [evaluation.batch(i) for i in range(len(evaluation))]
    rows = len(wanted["tokens"])
    assert rows == 4 + 1 + 3
    assert evaluation.sources == ["one", "two", "three"]
    wanted["source"] = [np.int32(i) for i in (0, 0, 0, 0, 1, 2, 2, 2)]
    for name, values in wanted.items():
        found = np.concatenate([batch[name] for batch in batches])
        assert found[:rows].tolist() == np.stack(values).tolist()
        assert name == "source" or not found[rows:].any()


@pytest.mark.parametrize("length", [1, 3, 64, 5000])
def test_an_epoch_holds_every_token_once(write_data: Write, length: int) -> None:
    folder = write_data([[np.arange(200), np.arange(1), np.arange(156)], [np.arange(40)]])
    batches = Batches(open_corpus(folder), 1, length, seed=3)
    count = batches.orders[0].rows_per_epoch
    assert count == -(-397 // length)
    orders = []
    for epoch in range(3):
        seen = np.zeros(397, int)
        steps = range(epoch * count, (epoch + 1) * count)
        assert [batches.rows(step)[0].epoch for step in steps] == [epoch] * count
        assert [batches.epochs(step)[0] for step in (steps.start, steps.stop)] == [epoch, epoch + 1]
        for step in steps:
            _, starts, lengths = batches.places(step)[1]
            np.add.at(seen, (starts[0] + np.arange(lengths[0])) % 397, 1)
        assert (seen == 1).all()
        orders.append([batches.places(step)[1].start.tolist() for step in steps])
    assert length == 1 or orders[0] != orders[1] != orders[2]
    assert length == 1 or {s % length for (s,) in orders[0]} != {s % length for (s,) in orders[1]}


@pytest.mark.usefixtures("small_records")
def test_a_step_depends_on_nothing_but_data_seed_and_step(write_data: Write) -> None:
    folder, _ = random_data(write_data, seed=1)
    steps = [0, 1, 2, 17, 10**9]
    forward = Batches(open_corpus(folder), 8, 5, seed=7)
    expected = {step: forward.batch(step) for step in steps}
    for step in reversed(steps):
        same(Batches(open_corpus(folder), 8, 5, seed=7).batch(step), expected[step])
        parts = [forward.batch(step, slice(i, i + 2)) for i in range(0, 8, 2)]
        same({n: np.concatenate([part[n] for part in parts]) for n in expected[step]}, expected[step])
        some = np.array([1, 2, 5])  # of a host whose devices lie apart
        same(forward.batch(step, some), {n: expected[step][n][some] for n in expected[step]})
    other = Batches(open_corpus(folder), 8, 5, seed=8)
    assert not all((other.batch(s)["tokens"] == expected[s]["tokens"]).all() for s in steps)
    double = Batches(open_corpus(folder), 16, 5, seed=7).batch(0)
    same({name: double[name][:8] for name in double}, expected[0])
    assert not np.array_equal(expected[0]["tokens"], expected[1]["tokens"])


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_what_is_worked_out_ahead_is_what_each_step_says(
    write_data: Write, monkeypatch: pytest.MonkeyPatch, packing: Literal["split", "best_fit"]
) -> None:
    monkeypatch.setattr("lm.data.batches._AHEAD_TOKENS", 11 * 7 * 3)
    corpus = open_corpus(write_data([[np.arange(250) % 258, np.arange(30)] * 2]), DataConfig(packing=packing))
    ahead = Batches(corpus, 7, 3, seed=0)
    expected = [Batches(corpus, 7, 3, seed=0).batch(step) for step in range(70)]
    some = np.array([1, 4])

    def check(step: int) -> None:
        same(ahead.batch(step), expected[step])

    for step in range(60):  # follow each other, as in a run
        check(step)
    assert len(ahead._ahead.places) == 11
    for step in [60, 60, 3, 4, 5, 7, 8, 6]:
        check(step)
    for step in range(4):  # other rows between them
        check(step)
        same(ahead.batch(step, some), {name: x[some] for name, x in expected[step].items()})
        same(ahead.batch(step, slice(2, 4)), {name: x[2:4] for name, x in expected[step].items()})
    for step in range(3):
        check(step)
    ahead.skips = Skips((Skip(1, 5),))  # a run that went back
    same(ahead.batch(0), expected[0])
    for step in range(1, 20):
        same(ahead.batch(step), expected[step + 5])


def test_the_shapes_are_known_without_reading(write_data: Write) -> None:
    folder, _ = random_data(write_data, seed=1)
    batches = Batches(open_corpus(folder), 8, 5, seed=7)
    batch, shapes = batches.batch(0), batches.shapes()
    assert {n: (x.shape, x.dtype) for n, x in shapes.items()} == {n: (x.shape, x.dtype) for n, x in batch.items()}


def test_a_pinned_batch(write_data: Write) -> None:
    """A change here changes the data of every run that is resumed."""
    batches = Batches(open_corpus(write_data([[np.arange(100)]])), 2, 8, seed=42)
    assert batches.batch(3)["tokens"].tolist() == [
        [96, 97, 98, 99, 0, 0, 0, 0],
        [56, 57, 58, 59, 60, 61, 62, 63],
    ]


def test_bad_input(write_data: Write) -> None:
    folder = write_data([[np.arange(10)]])
    with pytest.raises(ValueError, match="sequence_length"):
        Batches(open_corpus(folder), 1, 0, seed=0)
    with pytest.raises(DataError, match="heldout split is empty"):
        Evaluation(open_corpus(folder), "heldout", 1, 8)
    (folder / BytesTokenizer.file_name).unlink()
    assert TokenStream(folder, "train").tokens == 10
    Batches(open_corpus(folder), 1, 4, seed=0)  # the bytes tokenizer needs no file
