"""Fill in the middle: the middle of some documents is moved to their end, so that a causal model learns to insert text.

As Bavarian et al. 2022 ("Efficient Training of Language Models to Fill in the Middle") do it for whole documents: two
places are drawn among all characters, and the three parts, each encoded by itself, are put in one of two orders

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

half of the documents each, where <…> are three special tokens. This is done when the data is built. So nothing is lost
at the end of a row, and what the loss covers is the same as for other documents: every token after the first. As in
the paper, that includes the special ones. They cost a few nats in each document, for nothing in it tells where its
places were drawn: compare runs by their held-out loss, where no text is rearranged.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np

from lm.data.tokenizers import FIM_NAMES, Tokenizer
from lm.data.tokenizers.base import valid_text
from lm.errors import ConfigError

TRAINED_NAMES = FIM_NAMES[0]
"""The special tokens of tokenizers that are trained here."""


class Cut(NamedTuple):
    """Where the middle of a text begins and ends, in characters, and whether the suffix is put first."""

    start: int
    stop: int
    suffix_first: bool


class Sentinels(NamedTuple):
    """The ids that stand before the parts."""

    prefix: int
    suffix: int
    middle: int


def cut(text: str, rate: float) -> Cut | None:
    """How the text is cut, for a share `rate` of all texts; None for others. It depends on the text alone."""
    if not rate:
        return None
    digest = hashlib.sha256(b"fill in the middle\0" + valid_text(text).encode()).digest()
    drawn, order, one, other = (int.from_bytes(digest[i : i + 8], "big") for i in range(0, 32, 8))
    if drawn >= rate * 2**64:
        return None
    start, stop = sorted(place * (len(text) + 1) >> 64 for place in (one, other))
    return Cut(start, stop, order < 2**63)


def encode_cut(
    tokenizer: Tokenizer, texts: Sequence[str], cuts: Sequence[Cut | None], sentinels: Sentinels | None
) -> list[np.ndarray]:
    """The int32 [n] ids of each text, rearranged where it is cut. `sentinels` may be None when none is."""
    begins = tokenizer.encode_batch([text[: c.start] if c else text for text, c in zip(texts, cuts, strict=True)])
    if sentinels is None:
        return begins
    rest = [part for text, c in zip(texts, cuts, strict=True) if c for part in (text[c.start : c.stop], text[c.stop :])]
    parts = iter(tokenizer.encode_rest(rest))
    return [
        _arranged(begin, next(parts), next(parts), c, sentinels) if c else begin
        for begin, c in zip(begins, cuts, strict=True)
    ]


def _arranged(prefix: np.ndarray, middle: np.ndarray, suffix: np.ndarray, how: Cut, sentinels: Sentinels) -> np.ndarray:
    before, between, last = (np.array([token], np.int32) for token in sentinels)
    if how.suffix_first:
        return np.concatenate([before, between, suffix, last, prefix, middle])
    return np.concatenate([before, prefix, between, suffix, last, middle])


def find_sentinels(tokenizer: Tokenizer, names: tuple[str, str, str] | None) -> Sentinels:
    """The special tokens of these names; None: of those by which published tokenizers know them.

    Raises ConfigError when the tokenizer lacks one, or text that spells it would become it.
    """
    special = {tokenizer.piece(i): i for i in np.flatnonzero(tokenizer.token_bytes == 0).tolist()}
    for known in [names] if names else FIM_NAMES:
        if all(name in special for name in known):
            break
    else:
        if names is None:
            raise ConfigError(
                f"data.fim_rate: this {tokenizer.kind} tokenizer has no special tokens known to mark prefix, "
                f"suffix and middle, such as {', '.join(TRAINED_NAMES)}; name three of its own in data.fim_tokens"
            )
        missing = next(name for name in names if name not in special)
        close = get_close_matches(missing, special, 1)
        meant = f"; did you mean {close[0]!r}?" if close else f"; it has: {', '.join(itertools.islice(special, 12))}"
        raise ConfigError(f"data.fim_tokens: {missing!r} is no special token of this {tokenizer.kind} tokenizer{meant}")
    found = Sentinels(*(special[name] for name in known))
    if {*found} & {tokenizer.bos_id, tokenizer.eos_id}:
        raise ConfigError(f"data.fim_tokens: one of {', '.join(known)} begins or ends a document; choose three others")
    return found
