import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.data.batches import Batches
from lm.data.corpus import Corpus, open_corpus
from lm.data.show import parse_rows, show
from lm.errors import ConfigError


def test_shows_documents_and_what_is_not_trained(write_data: Callable[..., Path]) -> None:
    documents = [np.array([256, *text.encode(), 257]) for text in ("first é", "second 😀")]
    batches = Batches(open_corpus(write_data([documents])), 1, 64, seed=0)
    step = next(step for step in range(20) if batches.places(step)[1].start[0] not in (0, 10))  # inside a document
    lines = list(show(batches, step))
    assert lines[0].startswith(f"step {step}, epoch ")
    assert f"epoch {step}; 23 tokens, 21 trained" in lines[1]
    text = "\n".join(lines)
    assert "document 0" in text
    assert "document 1" in text
    assert "⟦<bos>⟧" in text
    assert "<eos>" in text
    assert text.count("segment") == 3
    assert text.count("⟦") == 4  # the line that explains it, and the first token of each segment


def test_control_characters_do_not_reach_the_terminal(write_data: Callable[..., Path]) -> None:
    document = np.array(list(b"a\x1b[2J\rb\x0cc\nd"))
    batches = Batches(open_corpus(write_data([[document]])), 1, len(document), seed=0)
    lines = list(show(batches, step=0))
    assert not set("\x1b\r\x0c\n") & set("".join(lines))
    assert "\\x1b" in "".join(lines)
    assert "\\x0d" in "".join(lines)


def test_rows_are_chosen(write_data: Callable[..., Path]) -> None:
    batches = Batches(open_corpus(write_data([[np.arange(100)]])), 4, 8, seed=0)
    everything = list(show(batches, step=0))
    assert sum("── row" in line for line in everything) == 4
    assert sum("── row" in line for line in show(batches, 0, slice(1, 3))) == 2


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("attention", ["document", "row"])
def test_all_that_a_batch_holds_is_shown(mixed: Callable[..., Corpus], packing: str, attention: str) -> None:
    batches = Batches(mixed(packing=packing, attention=attention), 8, 32, seed=1)
    step = 11
    header, *lines = show(batches, step)
    assert header.startswith(
        f"step 11, epoch web {batches.epochs(11)[0]:.2f}, code {batches.epochs(11)[1]:.2f}, books "
    )
    batch, rows = batches.batch(step), batches.rows(step)
    assert {row.source for row in rows} == {0, 1, 2}
    shown = "\n".join(lines).split("── row ")[1:]
    for number, (row, text) in enumerate(zip(rows, shown, strict=True)):
        first, *rest = text.splitlines()
        assert first.startswith(f"{number}: {batches.corpus.sources[row.source].name}, epoch {row.epoch}; ")
        assert f" {int(batch['loss_mask'][number].sum())} trained" in first
        segments = [int(line.split()[1].rstrip(":")) for line in rest if line.startswith("   segment ")]
        inside = batch["segments"][number][batch["segments"][number] > 0]
        assert {*segments} == {*inside.tolist()}
        trained = re.sub("⟦[^⟧]*⟧", "", "".join(line for line in rest if not line.startswith("   segment ")))
        kept = batch["targets"][number][batch["loss_mask"][number] > 0]
        assert trained == "".join({256: "<bos>", 257: "<eos>"}.get(t) or chr(t) for t in kept.tolist())


def test_documents_that_are_cut_are_said_to_be(write_texts: Callable[..., Corpus]) -> None:
    batches = Batches(write_texts({"": ["0123456789" * 5]}), 1, 20, seed=0)  # 52 tokens
    for step in range(3):
        [(start, length)] = batches.rows(step)[0].spans
        text = "\n".join(show(batches, step))
        whole = start == 0 and length == 52
        assert not whole
        first = next(line for line in text.splitlines() if "segment 1" in line)
        without = {(False, True): " without its beginning,", (True, False): " without its end,"}
        ends = start + length >= 52
        assert without.get((start == 0, ends), " without its beginning and end,") in first


def test_some_rows_are_shown_as_they_are_in_the_batch(mixed: Callable[..., Corpus]) -> None:
    batches = Batches(mixed(), 8, 32, seed=1)
    everything, some = list(show(batches, 9)), list(show(batches, 9, slice(5, 7)))
    begin = next(i for i, line in enumerate(everything) if line.startswith("── row 5: "))
    assert some[0] == everything[0]
    assert some[1:] == everything[begin : begin + len(some) - 1]


def test_rows_and_steps_that_cannot_be(write_data: Callable[..., Path]) -> None:
    assert parse_rows("3", 4) == slice(3, 4)
    assert parse_rows("0:4", 4) == slice(0, 4)
    for text in ("4", "2:2", "3:1", "0:5", "-1", "a:b", "", "1:2:3", ":2"):
        with pytest.raises(ConfigError, match="--rows must be A:B for the rows from A up to B, of 0:4"):
            parse_rows(text, 4)
    batches = Batches(open_corpus(write_data([[np.arange(100)]])), 4, 8, seed=0)
    assert next(show(batches, 10**15)).startswith("step 1000000000000000, ")
    for step in (-1, 10**30):
        with pytest.raises(ConfigError, match=r"--step must be (at least 0|below 288230376151711744), got "):
            next(show(batches, step))
