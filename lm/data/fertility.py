"""How many tokens a tokenizer makes of text that it was not trained on, and whether that text comes back."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from lm.data.config import DataConfig
from lm.data.corpus import samples
from lm.data.tokenizers import Tokenizer
from lm.data.vocabulary import make_tokenizer, unseen_text

_REPORT_BYTES = 4_000_000  # of text, at most about this
_BATCH = 256  # stretches that are in memory at once


def report(config: DataConfig, progress: Callable[[str], None]) -> Tokenizer:
    """Makes the tokenizer that a build of `config` makes, reports on it line by line, and returns it.

    Raises:
        DataError: bad input.
        ConfigError: `data.filter` cannot be imported.
    """
    text = samples(config)
    tokenizer = make_tokenizer(config, text, progress)
    begin, end = tokenizer.piece(tokenizer.bos_id), tokenizer.piece(tokenizer.eos_id)
    progress(f"{tokenizer.kind}: {tokenizer.vocab_size} tokens; a document begins with {begin} and ends with {end}")
    for line in lines(*measure(tokenizer, unseen_text(text, _REPORT_BYTES))):
        progress(line)
    return tokenizer


def measure(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> tuple[dict[str, Counter[str]], list[str]]:
    """Counts by source of the (source, text) given, and what did not come back, each as one line.

    `words` are what whitespace separates. `tokens` are without begin and end of document; of them,
    `byte_tokens` stand for a byte that fits in no piece, and `unknown` ones for no text at all.
    """
    is_byte = np.array([tokenizer.is_byte(i) for i in range(tokenizer.vocab_size)])
    is_unknown = tokenizer.token_bytes == 0
    counts: dict[str, Counter[str]] = {}
    changes = []
    remaining = iter(texts)
    while batch := list(itertools.islice(remaining, _BATCH)):
        for (source, text), ids in zip(batch, tokenizer.encode_batch([t for _, t in batch]), strict=True):
            counts.setdefault(source, Counter()).update(
                texts=1,
                bytes=len(text.encode()),
                words=len(text.split()),
                tokens=len(ids),
                byte_tokens=int(is_byte[ids].sum()),
                unknown=int(is_unknown[ids].sum()),
            )
            back = tokenizer.decode(ids.tolist())
            if back != text:
                changes.append(f"{source}: {_difference(text, back)}")
    return counts, changes


def lines(counts: dict[str, Counter[str]], changes: list[str]) -> Iterator[str]:
    """What `measure` found, as a person reads it."""
    if not counts:
        yield "no report: no text was kept from its training; hold some out with data.holdout_fraction"
        return
    total = sum(counts.values(), Counter[str]())
    rows = {**counts, **({"all of them": total} if len(counts) > 1 else {})}
    width = max(map(len, rows))
    yield "on text of the same sources that it was not trained on here:"
    yield f"  {'':<{width}} {'bytes':>11} {'tokens/byte':>12} {'tokens/word':>12} {'byte tokens':>12} {'unknown':>8}"
    for name, count in rows.items():
        per_word = f"{count['tokens'] / count['words']:.3f}" if count["words"] else "-"
        tokens = max(1, count["tokens"])
        yield (
            f"  {name:<{width}} {count['bytes']:>11,} {count['tokens'] / count['bytes']:>12.4f} {per_word:>12} "
            f"{count['byte_tokens'] / tokens:>12.3%} {count['unknown'] / tokens:>8.3%}"
        )
    if not changes:
        yield f"all {total['texts']:,} texts came back as they were"
        return
    yield f"{len(changes):,} of {total['texts']:,} texts did not come back as they were; the first, from {changes[0]}"


def _difference(text: str, back: str) -> str:
    """Where the two begin to differ."""
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    near = slice(max(0, at - 10), at + 10)
    return f"{text[near]!r} became {back[near]!r}"
