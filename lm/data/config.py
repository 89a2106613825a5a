"""What to train on and how it is tokenised."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

_FILES = {
    "huggingface": "tokenizer.json",
    "gpt2": "folder with vocab.json and merges.txt",
    "llama3": "tokenizer.model of Llama 3",
}


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer; without `path`, a sentencepiece model is trained on the training documents."""

    kind: Literal["bytes", "sentencepiece", "huggingface", "gpt2", "llama3"] = "sentencepiece"
    path: str | None = None
    """Of its file: for `huggingface` a tokenizer.json, for `llama3` a tokenizer.model; for `gpt2` its folder."""
    model_type: Literal["bpe", "unigram", "char"] = "bpe"
    """What is trained: `char` has one token for each character of the training text."""
    vocab_size: int = 8192
    """Of the model to train, at most: a small text supports fewer."""
    training_bytes: int = 8_000_000
    """Text sampled for training it, spread over all files."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for values that cannot work."""
        if self.kind == "bytes" and self.path is not None:
            yield "path", "the bytes tokenizer has no file; leave it None or choose another kind"
        if self.kind in _FILES and self.path is None:
            yield "path", f"must name a {_FILES[self.kind]}: only sentencepiece models are trained here"
        if self.vocab_size < 4:
            yield "vocab_size", f"must be at least 4, got {self.vocab_size}"
        if self.training_bytes < 1:
            yield "training_bytes", f"must be positive, got {self.training_bytes}"


@dataclass(frozen=True)
class DataConfig:
    """Documents, their split into training and held-out, and the tokenizer.

    A document is one text file, one line of a .jsonl file (both may be compressed: .gz, .zst), one record of an
    ArrayRecord file, or one row of a .parquet file or of a dataset that Hugging Face's library saved on disk. The last
    two need the extra `parquet`.
    """

    paths: tuple[str, ...] = ()
    """Files, folders, globs, local or bucket; `python-stdlib` is the running interpreter's library."""
    dir: str | None = dataclasses.field(default=None, metadata={"free": True})
    """Where the built files are; None: `data` in the run directory."""
    text_field: str = "text"
    """Of each JSON line, or the column of each row."""
    filter: str | None = None
    """`package.module:function`, called with each record as a dict; of those that it gives False for, none is read.

    A record has all fields of its line or row, or the one field `text` in files of plain text. The data is known by
    the name of the function alone: build anew when it decides differently.
    """
    holdout_paths: tuple[str, ...] = ()
    """When given, exactly these are held out and all other `paths` are trained on."""
    holdout_by: Literal["document", "tail"] = "document"
    """`document`: by the hash of its text, so that copies fall on one side. `tail`: the end of each."""
    holdout_fraction: float = 0.01
    tokenizer: TokenizerConfig = TokenizerConfig()
    workers: int = dataclasses.field(default=0, metadata={"free": True})
    """Processes that build; 0: one for each core. The result does not depend on it."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for values that cannot work."""
        if not self.paths:
            yield "paths", "empty; name files (text, .jsonl, .parquet), folders or globs, or 'python-stdlib'"
        if self.filter is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", self.filter):
            yield "filter", f"must be package.module:function, got {self.filter!r}"
        if not 0 <= self.holdout_fraction < 1:
            yield "holdout_fraction", f"must be at least 0 and below 1, got {self.holdout_fraction}"
        if self.workers < 0:
            yield "workers", f"must not be negative, got {self.workers}; 0 means one for each core"
