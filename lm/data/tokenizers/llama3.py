"""Llama 3's `tokenizer.model`: each line a token in base64 and its rank, which is its id; no merges are listed."""

from __future__ import annotations

import base64
import binascii
import itertools
from collections.abc import Mapping

from lm.data.tokenizers.byte_level import ByteLevelBPE, printable
from lm.data.tokenizers.quick import LLAMA3_PATTERN
from lm.errors import DataError

_SPECIALS = 256  # ids after the ranks; all but the first two are reserved for what is done after pretraining


class Llama3Tokenizer(ByteLevelBPE):
    """Ranks as tiktoken merges them: of all neighbours that together are a token, those of the lowest rank first.

    The library merges listed pairs only, and that is the same when each token of more than one byte is
    listed with its last two parts, those that merging its own bytes leaves. For whatever else stands around it, as
    long as no merge has crossed the ends of a token, the merges inside are those made on it alone; so no other
    two parts ever become that token.
    """

    kind = "llama3"
    file_name = "tokenizer.tiktoken"

    def __init__(self, content: bytes, origin: str = "Llama 3 tokenizer") -> None:
        """Raises DataError when the file is no list of ranks that can be used."""
        ranks = _ranks(content, origin)
        parts = [last_parts(word, ranks) for word in sorted(ranks, key=ranks.__getitem__)]
        names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|special {i}|>" for i in range(2, _SPECIALS))]
        super().__init__(
            content,
            origin,
            vocab={printable(word): rank for word, rank in ranks.items()},
            merges=[(printable(pair[0]), printable(pair[1])) for pair in parts if len(pair) == 2],
            specials={name: len(ranks) + i for i, name in enumerate(names)},
            pattern=LLAMA3_PATTERN,
            whole_words=True,
        )
        self.bos_id, self.eos_id = len(ranks), len(ranks) + 1


def last_parts(word: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """The parts of `word` when no two neighbours are a token any more, or together are all of it."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, i = min(pairs)
        if rank == len(ranks):
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _ranks(content: bytes, origin: str) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{origin}: line {number} is not a token in base64 and its rank") from None
    return ranks
