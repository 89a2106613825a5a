from collections.abc import Callable
from pathlib import Path

import numpy as np

from lm.data.batches import Batches
from lm.data.show import show
from lm.data.tokenizers import BytesTokenizer


def test_shows_documents_and_what_is_not_trained(write_data: Callable[..., Path]) -> None:
    tokenizer = BytesTokenizer()
    documents = [np.array([256, *text.encode(), 257]) for text in ("first é", "second 😀")]
    batches = Batches(write_data([documents]), "train", 1, 64, seed=0)
    step = next(step for step in range(20) if batches.places(step)[0] not in (0, 10))  # inside a document
    lines = list(show(batches, tokenizer, step))
    assert lines[0].startswith(f"step {step}, epoch {step};")
    assert "23 tokens, 21 trained" in lines[1]
    text = "\n".join(lines)
    assert "document 0" in text
    assert "document 1" in text
    assert "⟦<bos>⟧" in text
    assert "<eos>" in text
    assert text.count("segment") == 3
    assert text.count("⟦") == 4  # the line that explains it, and the first token of each segment


def test_control_characters_do_not_reach_the_terminal(write_data: Callable[..., Path]) -> None:
    document = np.array(list(b"a\x1b[2J\rb\x0cc\nd"))
    batches = Batches(write_data([[document]]), "train", 1, len(document), seed=0)
    lines = list(show(batches, BytesTokenizer(), step=0))
    assert not set("\x1b\r\x0c\n") & set("".join(lines))
    assert "\\x1b" in "".join(lines)
    assert "\\x0d" in "".join(lines)


def test_rows_are_chosen(write_data: Callable[..., Path]) -> None:
    batches = Batches(write_data([[np.arange(100)]]), "train", 4, 8, seed=0)
    everything = list(show(batches, BytesTokenizer(), step=0))
    assert sum("── row" in line for line in everything) == 4
    assert sum("── row" in line for line in show(batches, BytesTokenizer(), 0, slice(1, 3))) == 2
