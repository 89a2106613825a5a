"""The text of a batch, as a person reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from lm.data.batches import ALL_ROWS, Batch, Batches
from lm.data.tokenizers import Tokenizer

_OPEN, _CLOSE = "⟦", "⟧"


def show(batches: Batches, tokenizer: Tokenizer, step: int, rows: slice = ALL_ROWS) -> Iterator[str]:
    """Lines with the rows of a step: each segment with its document, positions and text.

    What stands between ⟦ and ⟧ is not a target of the loss; specials appear by name.
    """
    batch = batches.batch(step, rows)
    places, _ = batches.places(step, rows)
    size = batches.stream.tokens
    mask = batch["loss_mask"] > 0
    yield f"step {step}, epoch {batches.epoch_of(step)}; {_OPEN}…{_CLOSE} is not trained on"
    for row, place in enumerate(places.tolist()):
        used = int((batch["segments"][row] > 0).sum())
        trained = int(mask[row].sum())
        yield f"── row {row}: tokens {place:,} and on of {size:,}; {used} tokens, {trained} trained"
        for segment in range(1, int(batch["segments"][row].max(initial=0)) + 1):
            inside = np.flatnonzero(batch["segments"][row] == segment)
            first, last = int(inside[0]), int(inside[-1])
            document = batches.stream.document((place + first) % size)
            span = f"columns {first}–{last}, {int(mask[row, inside].sum())} trained"
            yield f"   segment {segment}: document {document:,}, {span}"
            yield from _printable(_text(batch, row, first, last, tokenizer)).split("\n")


def _text(batch: Batch, row: int, first: int, last: int, tokenizer: Tokenizer) -> str:
    """The targets of the segment after its first token, which nothing in the row predicts."""
    ids = [int(batch["tokens"][row, first]), *batch["targets"][row, first : last + 1].tolist()]
    trained = [False, *(batch["loss_mask"][row, first : last + 1] > 0).tolist()]
    if not trained[-1]:
        ids, trained = ids[:-1], trained[:-1]  # the next document's beginning, shown with that one
    parts: list[str] = []
    begin = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[begin]:
            text = _decode(tokenizer, ids[begin:end])
            parts.append(text if trained[begin] else f"{_OPEN}{text}{_CLOSE}")
            begin = end
    return "".join(parts)


def _printable(text: str) -> str:
    """Without control characters, which could do anything to a terminal."""
    return re.sub("[^\n\t\x20-\x7e\xa0-\U0010ffff]", lambda found: f"\\x{ord(found[0]):02x}", text)


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text, with ids that stand for none by name; ids between them are decoded together."""
    out: list[str] = []
    begin = 0
    for end in range(len(ids) + 1):
        if end == len(ids) or tokenizer.token_bytes[ids[end]] == 0:
            if begin < end:
                out.append(tokenizer.decode(ids[begin:end]))
            out += [tokenizer.piece(token) for token in ids[end : end + 1]]
            begin = end + 1
    return "".join(out)
