"""Bytes as tokens: nothing to train, nothing to load."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.data.tokenizers.base import Tokenizer, valid_text


class BytesTokenizer(Tokenizer):
    """One token for each byte of UTF-8, then begin (256) and end (257) of document."""

    kind = "bytes"
    file_name = "tokenizer.bytes"
    bos_id, eos_id = 256, 257

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)] + [b"", b""], b"bytes, bos 256, eos 257\n")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(valid_text(text).encode(), np.uint8).astype(np.int32) for text in texts]

    def _name(self, token: int) -> str:
        return "<bos>" if token == self.bos_id else "<eos>"
