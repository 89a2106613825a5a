"""`lm data stats`: what the documents are like, and what a run makes of them."""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.data import scan
from lm.data import stats as counting
from lm.data.batches import Batches
from lm.data.corpus import Corpus, open_corpus
from lm.data.stats import Stats, lines, stats

Write = Callable[..., Corpus]


def of(corpus: Corpus, steps: int = 20, rows: int = 8, length: int = 32) -> Stats:
    return stats(Batches(corpus, rows, length, seed=1), steps, 1, lambda line: None)


def documents(corpus: Corpus) -> dict[str, list[tuple[int, ...]]]:
    """All documents, read the plain way."""
    found = {}
    for one, stream in zip(corpus.sources, Batches(corpus, 1, 8, 0).streams, strict=True):
        starts = [*stream.document_starts(0, stream.tokens).tolist(), stream.tokens]
        tokens = stream.read(0, stream.tokens)[0].tolist()
        found[one.title] = [tuple(tokens[a:b]) for a, b in itertools.pairwise(starts)]
    return found


def test_counts_are_those_of_the_documents(mixed: Write) -> None:
    corpus = mixed()
    found, everything = of(corpus), documents(corpus)
    assert [one.name for one in found.sources] == ["web", "code", "books"]
    for one in found.sources:
        own = everything[one.name]
        assert one.documents == len(own)
        assert one.tokens == sum(map(len, own))
        assert one.bytes == one.tokens - 2 * len(own)
        by_power = Counter(len(document).bit_length() - 1 for document in own)
        assert one.lengths.documents == [by_power[i] for i in range(max(by_power) + 1)]
        assert sum(one.lengths.tokens) == one.tokens
        sizes = sorted(map(len, own), reverse=True)[:5]
        assert [document.tokens for document in one.longest] == sizes
        for document in one.longest:
            assert len(own[document.document]) == document.tokens
            assert document.first.startswith(f"{one.name} number {document.document} ")
    assert (found.sources[0].heldout_documents, found.sources[0].heldout_tokens) == (1, 15)
    seen = Counter(token for own in everything.values() for document in own for token in document)
    assert found.never_seen == 258 - len(seen)
    assert found.tokens == found.scanned_tokens == seen.total()
    assert found.frequent[0] == pytest.approx(
        (chr(seen.most_common(1)[0][0]), seen.most_common(1)[0][1] / seen.total())
    )


def test_lengths_that_are_read_in_stretches_are_the_same(mixed: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = mixed()
    expected = of(corpus)
    for stretch in (1, 17, 100, 10_000):
        monkeypatch.setattr(counting, "_STRETCH", stretch)
        assert of(corpus) == expected


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_what_packing_does_is_that_of_all_rows(mixed: Write, packing: str) -> None:
    """With a run so short that all of it is looked at."""
    corpus = mixed(packing=packing)
    batches = Batches(corpus, 8, 32, seed=1)
    found = stats(batches, 16, 1, lambda line: None)
    masked, padding, rows, begun, cut, longer = (Counter[int]() for _ in range(6))
    for step in range(16):
        batch = batches.batch(step)
        for number, row in enumerate(batches.rows(step)):
            rows[row.source] += 1
            inside = batch["segments"][number] > 0
            padding[row.source] += int((~inside).sum())
            masked[row.source] += int(inside.sum() - batch["loss_mask"][number].sum())
            tokens, column = batches.streams[row.source].tokens, 0
            for start, length in row.spans:
                at = [(start + i) % tokens for i in range(length)]
                first = [i for i in range(length) if batches.streams[row.source].read(at[i], 1)[1][0]]
                for a, b in itertools.pairwise([*first, length]):
                    begun[row.source] += 1
                    last = batch["loss_mask"][number][column + b - 1]  # whether its document goes on after it
                    cut[row.source] += int(last)
                    stream = batches.streams[row.source]
                    longer[row.source] += not any(stream.read((at[a] + n) % tokens, 1)[1] for n in range(1, 33))
                column += length
    for number, one in enumerate(found.sources):
        assert one.rows_planned == one.rows.sampled == rows[number]
        assert one.epochs_planned == rows[number] / batches.orders[number].rows_per_epoch
        assert (one.rows.masked, one.rows.padding) == (masked[number], padding[number])
        assert (one.rows.begun, one.rows.cut, one.rows.longer) == (begun[number], cut[number], longer[number])
        assert one.rows.cut >= one.rows.longer > 0
    assert found.rows.sampled == found.rows_planned == 128
    assert found.phases == [
        (0, {"web": 0.5, "code": 0.5}),
        (8, {"web": 0.25, "code": 0.25, "books": 0.5}),
    ]


@pytest.mark.parametrize(("tokens", "longer"), [(31, False), (32, False), (33, True)])
def test_documents_that_no_row_could_hold(write_texts: Write, tokens: int, longer: bool) -> None:
    rows = of(write_texts({"": ["x" * (tokens - 2)] * 40})).rows
    assert rows.longer == (rows.begun if longer else 0)
    assert rows.cut > 0


def test_best_fit_cuts_fewer(mixed: Write) -> None:
    corpus = mixed()
    other = dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, packing="best_fit"))
    split, fit = (of(one, length=128).rows for one in (corpus, other))
    assert 0 < fit.cut / fit.begun < split.cut / split.begun


def test_copies(write_texts: Write) -> None:
    texts = {
        "a": ["old", "new", "low", "one", "two", "one", "one", "two "],
        "b": ["two", "six", "one"],
        "c": ["six" * 40],
    }
    found = of(write_texts(texts))
    by_source = {one.name: one.copies for one in found.sources}
    assert [by_source[name].documents for name in "abc"] == [2, 0, 0]
    assert (found.copies.looked_at, found.copies.documents, found.copies.tokens) == (12, 4, 20)
    assert found.copies.share == 4 / 12
    assert found.most_copied_times == 4
    assert found.most_copied is not None
    assert (found.most_copied.source, found.most_copied.document, found.most_copied.first) == ("a", 3, "one<eos>")


@pytest.mark.usefixtures("small_records")
def test_copies_of_documents_of_many_records(write_texts: Write) -> None:
    long = "0123456789" * 20
    found = of(write_texts({"": ["a", long, "bc", long, long[:-1] + "8", "", ""]}))
    assert (found.copies.documents, found.copies.tokens) == (2, 204)


def test_copies_in_bounded_memory(write_texts: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the documents whose hash is kept all copies are known, so the share is right but for what chance does."""
    corpus = write_texts({"a": [f"text {i}" for i in range(300)], "b": [f"text {i % 100}" for i in range(300)]})
    exact = of(corpus).copies
    assert exact.documents == 300
    monkeypatch.setattr(counting, "_HASHES", 200)
    some = of(corpus).copies
    assert 100 < some.looked_at <= 200
    assert some.share == pytest.approx(0.5, abs=0.1)


def test_very_large_data_is_sampled_and_says_so(write_texts: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_texts({"a": [f"text {i:03}" for i in range(300)], "b": ["ß"]})
    monkeypatch.setattr(counting, "_SCANNED_TOKENS", 300)
    found = of(corpus)
    assert 300 <= found.scanned_tokens < 600
    assert found.tokens == 3004
    assert found.lengths == of(corpus).lengths
    assert sum(found.lengths.documents) == 301
    text = "\n".join(lines(found))
    assert f"(counted in {found.scanned_tokens / 3004:.1%} of the tokens, in shards evenly chosen)" in text
    assert found.copies.looked_at < 301


def test_processes_count_what_one_counts(mixed: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = mixed()
    alone = of(corpus)
    monkeypatch.setattr(scan, "_ALONE_BYTES", 0)
    said: list[str] = []
    assert stats(Batches(corpus, 8, 32, seed=1), 20, 2, said.append) == alone
    assert said[-1].startswith("reading tokens: ")


def test_what_is_printed(mixed: Write, write_texts: Write) -> None:
    found = of(mixed())
    text = list(lines(found))
    header, web, code, books, every, *_ = text
    assert header.split() == ["documents", "tokens", "bytes", "bytes/token", "held-out", "tokens", "copies"]
    assert [line.split()[0] for line in (web, code, books, every)] == ["web", "code", "books", "all"]
    assert web.split()[1:3] == ["30", f"{found.sources[0].tokens:,}"]
    [bars] = [line for line in text if line.lstrip().startswith("32–63 ")]
    assert bars.split()[1] == str(found.lengths.documents[5])
    assert "█" in bars
    assert "a run of 20 steps, 160 rows of 32 tokens:" in text
    assert "  from step 8: web 25.0%, code 25.0%, books 50.0%" in text
    assert json.loads(json.dumps(found.to_dict()))["sources"][1]["name"] == "code"


def test_one_source_with_control_characters(write_data: Callable[..., Path]) -> None:
    folder = write_data([[np.array([256, 27, 10, 65, 257]), np.arange(100)]])
    text = list(lines(of(open_corpus(folder))))
    assert len([line for line in text if line.startswith("data")]) == 1
    assert not any(line.split(" ")[0] == "all" for line in text)
    assert not set("\x1b\n") & set("".join(text))
