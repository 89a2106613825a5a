"""What all tokenizers share: a table from each id to the bytes that it stands for, and a way to encode.

All decoding goes through the table, so a token that is half a character is no special case.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np

from lm.errors import DataError

Kind = Literal["bytes", "sentencepiece", "huggingface", "gpt2", "llama3"]


class Tokenizer:
    """What all kinds share. `bos_id` begins and `eos_id` ends every document."""

    kind: Kind
    file_name: str
    bos_id: int
    eos_id: int

    def __init__(self, table: Sequence[bytes], serialized: bytes) -> None:
        self._table = list(table)
        self._serialized = serialized
        self._strip = b""
        self.token_bytes = np.array([len(raw) for raw in table], np.int32)
        """int32 [V]: bytes of text that each id stands for; 0 for ids that stand for none."""

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    @property
    def pieces(self) -> Sequence[bytes]:
        """The bytes of text that each id stands for."""
        return self._table

    @property
    def added(self) -> bytes:
        """What the first piece of a text may begin with that is not of the text."""
        return self._strip

    @property
    def fingerprint(self) -> str:
        """Equal exactly for tokenizers of the same kind and file content."""
        return hashlib.sha256(self.kind.encode() + b"\0" + self._serialized).hexdigest()

    def serialize(self) -> bytes:
        """The content of a file from which `load_tokenizer` makes the same tokenizer."""
        return self._serialized

    def encode(self, text: str) -> np.ndarray:
        """The int32 [n] ids of the text alone, without begin or end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; quicker than one by one where the library can."""
        return [np.array(self._ids(valid_text(text)), np.int32) for text in texts]

    def encode_rest(self, texts: Sequence[str]) -> list[np.ndarray]:
        """As `encode_batch`, of texts that go on where others end: without the space that some models put in front.

        Raises DataError where a model of these cannot do that.
        """
        if not self._strip:
            return self.encode_batch(texts)
        mark = self.encode("\n")  # takes the space, and is no part of longer pieces
        found = self.encode_batch(["\n" + text for text in texts])
        if not all(np.array_equal(ids[: len(mark)], mark) for ids in found):
            raise DataError(f"this {self.kind} tokenizer cannot encode the parts of a text by themselves")
        return [ids[len(mark) :] for ids in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; what is no valid UTF-8 comes out as U+FFFD."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text that each id completes, possibly "", and at the end what was left incomplete.

        A character made of several tokens appears with the last of them.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        first = True
        for token in ids:
            raw = self._table[token]
            if first and raw:
                raw, first = raw.removeprefix(self._strip), False
            yield decoder.decode(raw)
        yield decoder.decode(b"", final=True)

    def piece(self, token: int) -> str:
        """The id as a person wants to see it: its text, or its name where it has none."""
        return self._table[token].decode("utf-8", "backslashreplace") or self._name(token)

    def is_byte(self, token: int) -> bool:
        """Whether the id is what is left where no piece fits: part of a character, or what a model calls <0x0A>."""
        raw = self._table[token]
        return len(raw) == 1 and (raw >= b"\x80" or self._name(token).startswith("<0x"))

    def _ids(self, text: str) -> Sequence[int]:
        raise NotImplementedError

    def _name(self, token: int) -> str:
        raise NotImplementedError


def valid_text(text: str) -> str:
    """The text itself, or with U+FFFD for lone surrogates, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def chunks(text: str, size: int) -> Iterator[str]:
    """Cuts the text into parts of at most `size` characters, after a newline where there is one."""
    start = 0
    while start < len(text):
        stop = min(len(text), start + size)
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop
