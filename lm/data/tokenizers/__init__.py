"""Text to token ids and back: bytes, sentencepiece, Hugging Face `tokenizer.json`, GPT-2's and Llama 3's own files."""

from __future__ import annotations

import re

from etils import epath

from lm.data.tokenizers import gpt2
from lm.data.tokenizers.base import Kind, Tokenizer, chunks, valid_text
from lm.data.tokenizers.gpt2 import GPT2Tokenizer
from lm.data.tokenizers.hugging_face import HuggingFaceTokenizer
from lm.data.tokenizers.llama3 import Llama3Tokenizer
from lm.data.tokenizers.sentencepieces import SentencePieceTokenizer, train_sentencepiece
from lm.data.tokenizers.sentinels import FIM_NAMES
from lm.data.tokenizers.utf8 import BytesTokenizer
from lm.errors import DataError

__all__ = [
    "FILE_NAMES",
    "FIM_NAMES",
    "BytesTokenizer",
    "GPT2Tokenizer",
    "HuggingFaceTokenizer",
    "Kind",
    "Llama3Tokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "chunks",
    "load_tokenizer",
    "train_sentencepiece",
    "valid_text",
]

_FROM_FILES = {c.kind: c for c in (SentencePieceTokenizer, HuggingFaceTokenizer, GPT2Tokenizer, Llama3Tokenizer)}

FILE_NAMES: dict[str, str] = {c.kind: c.file_name for c in (BytesTokenizer, *_FROM_FILES.values())}


def load_tokenizer(kind: str, source: bytes | epath.PathLike = b"") -> Tokenizer:
    """The tokenizer from the content of its file, or from a path or URL; for `gpt2` also that of a folder.

    Raises:
        DataError: the file is missing or is not of this kind.
    """
    if kind == "bytes":
        return BytesTokenizer()
    if kind not in _FROM_FILES:
        raise DataError(f"unknown kind of tokenizer {kind!r}; known: {', '.join(FILE_NAMES)}")
    content, origin = (source, f"{kind} tokenizer") if isinstance(source, bytes) else (_read(kind, source), str(source))
    if not content:
        raise DataError(f"{origin}: empty, so not a tokenizer")
    try:
        return _FROM_FILES[kind](content, origin)
    except DataError as error:
        if (likely := _likely_kind(content)) not in (kind, ""):
            raise DataError(f"{error}; it looks like data.tokenizer.kind '{likely}'") from None
        raise


def _read(kind: str, source: epath.PathLike) -> bytes:
    path = epath.Path(source).expanduser()
    try:
        if kind == "gpt2" and path.is_dir():
            return gpt2.read_folder(path)
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot read the tokenizer: {error.strerror or error}") from None


def _likely_kind(content: bytes) -> str:
    """What a file seems to be by how it begins, or "": only to be suggested."""
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content):
        return "llama3"
    if re.match(rb"\s*\{", content):
        return "huggingface" if b'"added_tokens"' in content else "gpt2"
    return "sentencepiece" if b"<unk>" in content[:64] else ""
