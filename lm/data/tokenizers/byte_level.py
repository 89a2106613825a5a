"""Byte-level BPE: the bytes of UTF-8, each written as one printable character, merged pair by pair.

The merging is done by the `tokenizers` library. Text that spells a special token stays text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.tokenizers.base import Kind, Tokenizer, valid_text
from lm.data.tokenizers.quick import GPT2_PATTERN, Encode, quick_encoder
from lm.errors import DataError

QUICK_FROM = 1 << 20
"""Characters after which a quicker encoder is made."""


def library(kind: Kind) -> Any:
    """The `tokenizers` module. Raises DataError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            f"data.tokenizer.kind '{kind}' needs the tokenizers library: pip install 'lm[huggingface]'"
        ) from None
    return tokenizers


class LibraryTokenizer(Tokenizer):
    """A tokenizer whose `_model` is one of the `tokenizers` library."""

    _model: Any
    _characters = 0
    _quick: Encode | None = None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        texts = [valid_text(text) for text in texts]
        if self._characters < QUICK_FROM:
            self._characters += sum(map(len, texts))
            if self._characters >= QUICK_FROM:
                self._quick = self._quick_encoder()
        if self._quick is not None:
            return [self._quick(text) for text in texts]
        batch = self._model.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in batch]

    def _quick_encoder(self) -> Encode | None:
        """One that gives the same ids sooner, if there is any. Takes a second to make."""
        raise NotImplementedError


class ByteLevelBPE(LibraryTokenizer):
    """Byte-level BPE from its vocabulary and merges; the special tokens are ids of their own beside these."""

    def __init__(
        self,
        content: bytes,
        origin: str,
        *,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        specials: Mapping[str, int],
        pattern: str | None,
        whole_words: bool,
    ) -> None:
        """`vocab` and `merges` are in printable characters, the merges in the order in which they are made.

        Text is first split by the regular expression `pattern`; None: as GPT-2 does. With `whole_words`, what
        such a split gives is not merged where it is in the vocabulary as a whole.
        Raises DataError if the ids are not 0 to V - 1, if not every byte has one, or if a merge has none.
        """
        tokenizers = library(self.kind)
        names = {i: name for name, i in (*vocab.items(), *specials.items())}
        size = len(vocab) + len(specials)
        if names.keys() != set(range(size)):
            raise DataError(f"{origin}: the ids of its {size} tokens must be 0 to {size - 1}, each once")
        if missing := [byte for character, byte in _BYTES.items() if character not in vocab]:
            raise DataError(f"{origin}: no token for the byte {missing[0]:#04x}, so not every text could be encoded")
        for number, (left, right) in enumerate(merges, 1):
            if unknown := [token for token in (left, right, left + right) if token not in vocab]:
                raise DataError(
                    f"{origin}: merge {number}, {left!r} {right!r}, needs the token {unknown[0]!r}, "
                    "which is not in the vocabulary"
                )
        special = set(specials.values())
        table = [b"" if i in special else byte_level_bytes(names[i], origin) for i in range(size)]
        super().__init__(table, content)
        self._names = names
        self._parts = vocab, merges, pattern or GPT2_PATTERN
        self._model = tokenizers.Tokenizer(tokenizers.models.BPE(dict(vocab), list(merges), ignore_merges=whole_words))
        to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        if pattern is not None:
            split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
            to_bytes = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
        self._model.pre_tokenizer = to_bytes

    def _name(self, token: int) -> str:
        return self._names[token]

    def _quick_encoder(self) -> Encode | None:
        return quick_encoder(*self._parts, lambda word: byte_level_bytes(word, self.kind))


def byte_level_bytes(piece: str, origin: str) -> bytes:
    """The bytes that a token's printable characters stand for. Raises DataError for others."""
    try:
        return bytes(_BYTES[character] for character in piece)
    except KeyError as error:
        raise DataError(
            f"{origin}: the token {piece!r} has {error.args[0]!r}, which byte-level BPE writes for no byte"
        ) from None


def printable(raw: bytes) -> str:
    """The characters by which byte-level BPE writes the bytes."""
    return raw.decode("latin-1").translate(_CHARACTERS)


def _byte_level_alphabet() -> dict[str, int]:
    """The character that GPT-2's vocabulary writes for each byte: itself if printable, else 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_level_alphabet()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}
