"""What the log says of the data when a run starts."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.data.batches import ALL_ROWS, Batches
from lm.data.config import PhaseConfig
from lm.data.corpus import Corpus, open_corpus
from lm.data.report import report
from lm.data.stream import Shelf

Write = Callable[..., Corpus]


def said(corpus: Corpus, steps: int = 4, step: int = 0, rows: int = 8, length: int = 32) -> list[str]:
    return list(report(Batches(corpus, rows, length, seed=1), step, steps, ALL_ROWS))


def warnings(corpus: Corpus, **sizes: int) -> list[str]:
    return [line.removeprefix("warning: ") for line in said(corpus, **sizes) if line.startswith("warning: ")]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_run_as_planned(mixed: Write, packing: str) -> None:
    corpus = mixed(packing=packing)
    batches = Batches(corpus, 8, 32, seed=1)
    lines = list(report(batches, 9, 16, np.array([3, 4, 7])))
    for line, row in zip(lines, (3, 4), strict=False):
        where = batches.rows(9, np.array([row]))[0]
        head, text = line.split(": ", 1)
        assert head == f"step 9 row {row}, {corpus.sources[where.source].name}"
        tokens = batches.batch(9)["tokens"][row][batches.batch(9)["segments"][row] > 0].tolist()
        assert text.startswith("".join({256: "<bos>", 257: "<eos>"}.get(t) or chr(t) for t in tokens))
    epochs = dict(zip(("web", "code", "books"), batches.epochs(16), strict=True))
    assert [line.split(":")[0] for line in lines[2:5]] == ["web", "code", "books"] or epochs["web"] == epochs["code"]
    for line in lines[2:5]:
        name, rest = line.split(": ")
        share = {"web": "37.5%", "code": "37.5%", "books": "25.0%"}[name]
        assert rest.startswith(f"{share} of all rows, {epochs[name]:.3g} epochs in 16 steps, of ")
    assert lines[5].startswith("warning: read again and again: ")
    assert "code " in lines[5]
    assert len(lines) == 6


def test_rows_are_one_line_without_control_characters(write_texts: Write) -> None:
    corpus = write_texts({"": ["two\nlines \x1b[2J and \u2028 more " * 30]})
    first, second, plan, *rest = said(corpus, steps=1, rows=2, length=500)
    assert not set("\n\x1b\u2028") & {*first, *second}
    assert "two\\nlines \\x1b[2J" in first
    assert len(first) < 230
    assert plan.startswith("data: 1 epochs in 1 steps, of 842 tokens")
    assert rest == []


def test_sources_that_are_many_or_not_read(write_texts: Write) -> None:
    texts = {f"s{i}": [f"text {i} " * 90] for i in range(9)}
    phases = (PhaseConfig(0, tuple((f"s{i}", 1.0) for i in range(7))), PhaseConfig(2, (("s7", 1.0),)))
    lines = said(write_texts(texts, mixture=phases), steps=2, rows=14, length=16)
    assert "and 4 more sources: 28.6% of all rows, at most 0.1" in "\n".join(lines)
    assert lines[-1] == "warning: never read in 2 steps: s7, s8"
    assert len(lines) <= 12


def test_the_end_of_a_document_that_is_never_trained(write_texts: Write, write_data: Callable[..., Path]) -> None:
    texts = ["some words" for _ in range(40)]
    assert warnings(write_texts({"": texts})) == []
    folder = write_data([[np.array([256, *text.encode()]) for text in texts]], name="other")
    [line] = warnings(open_corpus(folder))
    assert line.startswith("the end of a document, <eos>, is never a target in the first 8 rows, in which ")
    # Only the last token of one is in the row: nothing there could have it as a target.
    tokens = open_corpus(write_data([[np.array([256, 65, 257])]], name="three"))
    step = next(i for i in range(99) if Batches(tokens, 1, 1, seed=1).batch(i)["tokens"] == 257)
    assert not [line for line in said(tokens, 99, step, rows=1, length=1) if "the end of a document" in line]
    # No document ends where one is longer than all that is read.
    assert warnings(open_corpus(write_data([[np.full(5000, 65)]], name="long"))) == []


def test_tokens_that_stand_for_no_text(write_data: Callable[..., Path]) -> None:
    corpus = open_corpus(write_data([[np.array([256, *b"abcdefgh" * 20, 257]) for _ in range(10)]]))
    assert warnings(corpus) == []
    corpus.tokenizer.token_bytes[ord("c")] = 0  # as an unknown id
    [line] = warnings(corpus)
    assert line.startswith("tokens in the first 8 rows that stand for no text: c 12.")
    named = dataclasses.replace(corpus, data=dataclasses.replace(corpus.data, fim_tokens=("a", "b", "c")))
    assert warnings(named) == []


def test_rows_that_are_mostly_not_trained_on(write_texts: Write) -> None:
    corpus = write_texts({"": ["text"]})
    assert warnings(corpus, steps=1, rows=4, length=100) == [
        "only 5.0% of the places in the first 4 rows are trained on; 94.0% are padding"
    ]
    shown = said(corpus, steps=1, rows=4, length=100)[0].removeprefix("step 0 row 0: ")
    assert len(shown) == len("<bos>text<eos>")  # and no padding


def test_few_rows_are_read(write_texts: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_texts({"": ["some words of a text " * 500 for _ in range(60)]})
    batches = Batches(corpus, 512, 64, seed=0)
    read = []
    record = Shelf._record
    monkeypatch.setattr(Shelf, "_record", lambda self, *where: read.append(where) or record(self, *where))
    batches = Batches(corpus, 512, 64, seed=0)
    list(report(batches, 0, 100, ALL_ROWS))
    assert 0 < len(read) <= 2 * 32
