"""GPT-2's own files: a vocabulary in JSON and a list of merges, in one folder under either of their two names."""

from __future__ import annotations

import json
from typing import Any

from etils import epath

from lm.data.tokenizers.byte_level import ByteLevelBPE
from lm.errors import DataError

_NAMES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_END = "<|endoftext|>"


class GPT2Tokenizer(ByteLevelBPE):
    """GPT-2's BPE (https://github.com/openai/gpt-2); <|endoftext|> both begins and ends a document."""

    kind = "gpt2"
    file_name = "tokenizer.gpt2.json"

    def __init__(self, content: bytes, origin: str = "GPT-2 tokenizer") -> None:
        """From what `read_folder` gives. Raises DataError when it is no such tokenizer."""
        stored = _json(content, origin)
        try:
            vocab, merges = dict(stored["vocab"]), [tuple(line.split(" ")) for line in stored["merges"]]
        except (TypeError, KeyError, ValueError, AttributeError):
            raise DataError(
                f"{origin}: not a GPT-2 tokenizer; name the folder of its vocab.json and merges.txt"
            ) from None
        if not all(type(i) is int for i in vocab.values()):
            raise DataError(f"{origin}: the vocabulary must give a whole number for each token")
        if _END not in vocab:
            raise DataError(f"{origin}: {_END}, which begins and ends a document, is not in the vocabulary")
        for number, merge in enumerate(merges, 1):
            if len(merge) != 2:
                raise DataError(f"{origin}: merge {number} must be two tokens with a space between, not {merge}")
        end = {_END: vocab.pop(_END)}
        super().__init__(content, origin, vocab=vocab, merges=merges, specials=end, pattern=None, whole_words=False)
        self.bos_id = self.eos_id = end[_END]


def read_folder(folder: epath.Path) -> bytes:
    """Both files as one, the same bytes whatever their names and layout. Raises DataError where one is missing."""
    for vocab_name, merges_name in _NAMES:
        vocab, merges = folder / vocab_name, folder / merges_name
        if vocab.exists() and merges.exists():
            break
    else:
        raise DataError(f"{folder}: has neither vocab.json and merges.txt nor encoder.json and vocab.bpe")
    try:
        lines = merges.read_bytes().decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{merges}: not a list of merges: {error}") from None
    comment = lines[0].startswith("#version")
    content = {"vocab": _json(vocab.read_bytes(), str(vocab)), "merges": [line for line in lines[comment:] if line]}
    return json.dumps(content, sort_keys=True).encode()


def _json(content: bytes, origin: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin}: not JSON: {error}") from None
