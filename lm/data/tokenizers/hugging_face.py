"""Hugging Face `tokenizer.json` files."""

from __future__ import annotations

import json
import re
from typing import Any

from lm.data.tokenizers.byte_level import LibraryTokenizer, byte_level_bytes, library
from lm.data.tokenizers.quick import Encode, of_json
from lm.data.tokenizers.sentinels import FIM_NAMES
from lm.errors import DataError


class HuggingFaceTokenizer(LibraryTokenizer):
    """A `tokenizer.json`: byte-level BPE (GPT-2, Llama 3) or pieces with byte fallback (Llama 2)."""

    kind = "huggingface"
    file_name = "tokenizer.json"

    _BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[CLS]")
    _EOS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")

    def __init__(self, content: bytes, origin: str = "tokenizer.json") -> None:
        """Raises DataError when the file is no tokenizer that can be used, or the library is missing."""
        tokenizers = library(self.kind)
        try:
            self._model = tokenizers.Tokenizer.from_str(_with_special_fim(content.decode()))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{origin}: not a Hugging Face tokenizer: {error}") from None
        self._model.encode_special_tokens = True  # a document that spells <|endoftext|> must not end there
        self._model.no_truncation()  # which some files ask for, at the length of their model
        self._model.no_padding()
        decoder = _types(json.loads(content).get("decoder"))
        if not decoder & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise DataError(f"{origin}: only byte-level tokenizers and those with byte fallback can be used")
        added = self._model.get_added_tokens_decoder()
        unspaced = "ByteLevel" not in decoder
        vocab: dict[str, int] = self._model.get_vocab()
        table = []
        for i in range(max(vocab.values(), default=-1) + 1):
            piece = self._model.id_to_token(i) or ""
            if i in added:
                table.append(b"" if added[i].special else piece.encode())
            else:
                table.append(_metaspace_bytes(piece) if unspaced else byte_level_bytes(piece, origin))
        super().__init__(table, content)
        begin, end = ([vocab[n] for n in names if n in vocab] for names in (self._BOS, self._EOS))
        if not begin + end:
            raise DataError(f"{origin}: none of {', '.join(self._BOS + self._EOS)} is in its vocabulary")
        self.bos_id, self.eos_id = (begin + end)[0], (end + begin)[0]
        adds_space = unspaced and self._table[next(iter(self.encode("a")), self.bos_id)].startswith(b" ")
        self._strip = b" " if adds_space else b""

    def _quick_encoder(self) -> Encode | None:
        return of_json(self._model.to_str(), lambda word: byte_level_bytes(word, self.kind))

    def _name(self, token: int) -> str:
        return self._model.id_to_token(token) or f"<unused {token}>"


def _with_special_fim(content: str) -> str:
    """Some files list what marks a middle to fill in among their additions to the text."""
    stored = json.loads(content)
    names = {name for names in FIM_NAMES for name in names}
    plain = [token for token in stored.get("added_tokens", []) if token["content"] in names and not token["special"]]
    for token in plain:
        token["special"] = True
    return json.dumps(stored) if plain else content


def _types(node: Any) -> set[str]:
    """All values of "type" in a nested JSON value."""
    if isinstance(node, dict):
        own = {node["type"]} if isinstance(node.get("type"), str) else set()
        return own.union(*map(_types, node.values()))
    return set().union(*map(_types, node)) if isinstance(node, list) else set()


def _metaspace_bytes(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()
