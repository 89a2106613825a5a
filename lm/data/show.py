"""The text of a batch, as a person reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lm.data.batches import ALL_ROWS, Batch, Batches
from lm.data.passages import Passage, passages
from lm.data.stream import TokenStream
from lm.data.tokenizers import Tokenizer
from lm.errors import ConfigError

_OPEN, _CLOSE = "⟦", "⟧"
_ROWS = 1 << 60  # of a run: what int64 holds, with room for sums


def show(batches: Batches, step: int, rows: slice = ALL_ROWS) -> Iterator[str]:
    """Lines with the rows of a step: each document in them with its source, segment, place and text.

    What stands between ⟦ and ⟧ is not a target of the loss; specials appear by name.
    Raises ConfigError for a step that no run has.
    """
    if step < 0:
        raise ConfigError(f"--step must be at least 0, got {step}")
    if step >= _ROWS // batches.batch_size:
        raise ConfigError(f"--step must be below {_ROWS // batches.batch_size}, got {step}")
    batch, corpus, length = batches.batch(step, rows), batches.corpus, batches.sequence_length
    epochs = [
        f"{one.name} {epoch:.2f}".strip() for one, epoch in zip(corpus.sources, batches.epochs(step), strict=True)
    ]
    yield f"step {step}, epoch {', '.join(epochs)}; {_OPEN}…{_CLOSE} is not trained on"
    for row, (number, (source, epoch, spans)) in enumerate(
        zip(range(*rows.indices(batches.batch_size)), batches.rows(step, rows), strict=True)
    ):
        used, stream, name = sum(size for _, size in spans), batches.streams[source], corpus.sources[source].name
        trained, padding = int((batch["loss_mask"][row] > 0).sum()), f", {length - used} of padding"
        of = f"{name}, " if name else ""
        counts = f"{used} tokens, {trained} trained{padding if used < length else ''}"
        yield f"── row {number}: {of}epoch {epoch}; {counts}"
        column = 0
        for start, size in spans:
            for passage in passages(stream, start, size):
                yield from _passage(batch, row, column + passage.offset, passage, stream, corpus.tokenizer)
            column += size


def parse_rows(text: str, batch_size: int) -> slice:
    """From `8:16`, or `8` for that row alone. Raises ConfigError for what is not in a batch of that size."""
    found = re.fullmatch(r"([0-9]+)(?::([0-9]+))?", text)
    if found is not None:
        first = int(found[1])
        stop = int(found[2]) if found[2] else first + 1
        if first < stop <= batch_size:
            return slice(first, stop)
    raise ConfigError(
        f"--rows must be A:B for the rows from A up to B, of 0:{batch_size}, or the number of one; got {text!r}"
    )


def printable(text: str) -> str:
    """Without control characters, which could do anything to a terminal."""
    return re.sub("[^\n\t\x20-\x7e\xa0-\U0010ffff]", lambda found: f"\\x{ord(found[0]):02x}", text)


def one_line(text: str) -> str:
    """`printable`, with line breaks written out."""
    return printable(text).replace("\n", "\\n").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
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


def _passage(
    batch: Batch, row: int, left: int, passage: Passage, stream: TokenStream, tokenizer: Tokenizer
) -> Iterator[str]:
    """The passage that begins in the column `left` of the row."""
    right = left + passage.tokens - 1
    trained = int((batch["loss_mask"][row, left : right + 1] > 0).sum())
    place = f"tokens {passage.position:,} and on of {stream.tokens:,}"
    missing = " and ".join(part for part, here in (("beginning", passage.begins), ("end", passage.ends)) if not here)
    without = f" without its {missing}" if missing else ""
    yield (
        f"   segment {batch['segments'][row, left]}: document {stream.document(passage.position):,}{without}, {place}, "
        f"columns {left}–{right}, {trained} trained"
    )
    yield from printable(_text(batch, row, left, right, tokenizer)).split("\n")


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
            text = decode(tokenizer, ids[begin:end])
            parts.append(text if trained[begin] else f"{_OPEN}{text}{_CLOSE}")
            begin = end
    return "".join(parts)
