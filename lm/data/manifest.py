"""What a data directory holds: written last, so that its presence says that the build is complete."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from lm.data.records import FORMAT, Shard
from lm.data.tokenizers import Tokenizer, load_tokenizer
from lm.errors import DataError

FILE = "manifest.json"
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class SourceCount:
    """What came from one entry of `data.paths`; `skipped` says why documents were left out."""

    documents: int = 0
    heldout_documents: int = 0
    bytes: int = 0
    tokens: int = 0
    fim_documents: int = 0
    """Those whose middle was moved to their end."""
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    checksum: str | None = None
    """The sum of the sha256 of all documents that were read, modulo 2^256: of the same documents the same, however they
    lay in files. None for what earlier versions built."""


@dataclass(frozen=True)
class TokenizerRecord:
    kind: str
    file: str
    fingerprint: str
    vocab_size: int


@dataclass(frozen=True)
class Manifest:
    """Shards of both splits and where they came from. `tokens` and `documents` count specials, not text."""

    tokenizer: TokenizerRecord
    sources: dict[str, SourceCount]
    splits: dict[str, tuple[Shard, ...]]
    overlap: dict[str, Any] | None = None
    """With evaluation sets, where the config names some: their files, the documents by source, the worst of them."""

    @property
    def fingerprint(self) -> str:
        """Equal exactly when the tokenizer and every token of both splits are: what training depends on."""
        shards = {split: [(s.tokens, s.sha256) for s in self.splits[split]] for split in SPLITS}
        content = json.dumps([FORMAT, self.tokenizer.fingerprint, shards])
        return hashlib.sha256(content.encode()).hexdigest()

    def tokens(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits[split])

    def documents(self, split: str) -> int:
        return sum(shard.documents for shard in self.splits[split])

    def text_bytes(self, split: str) -> int:
        return sum(shard.text_bytes for shard in self.splits[split])

    def to_dict(self) -> dict[str, Any]:
        totals = {
            split: {
                "tokens": self.tokens(split),
                "documents": self.documents(split),
                "bytes": self.text_bytes(split),
            }
            for split in SPLITS
        }
        fields = {"format": FORMAT, "fingerprint": self.fingerprint, "totals": totals}
        return fields | dataclasses.asdict(self)


def read_manifest(directory: epath.PathLike) -> Manifest:
    """Raises DataError if the directory holds no complete build, or one of another format."""
    path = epath.Path(directory) / FILE
    try:
        fields = json.loads(path.read_text())
        if fields["format"] != FORMAT:
            raise DataError(f"{path}: format {fields['format']}, but this version reads {FORMAT}; build again with it")
        manifest = Manifest(
            TokenizerRecord(**fields["tokenizer"]),
            {name: SourceCount(**count) for name, count in fields["sources"].items()},
            {split: tuple(Shard(**shard) for shard in fields["splits"][split]) for split in SPLITS},
            fields.get("overlap"),
        )
    except FileNotFoundError:
        raise DataError(f"{directory}: no built data here; run `lm data build` first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: unreadable ({error!r}); delete the directory and build again") from None
    names = [manifest.tokenizer.file, *(shard.file for split in SPLITS for shard in manifest.splits[split])]
    if outside := [name for name in names if "/" in name]:
        raise DataError(f"{path}: {outside[0]!r} is no name of a file beside it; delete the directory and build again")
    if manifest.fingerprint != fields.get("fingerprint"):
        raise DataError(f"{path}: changed since it was written; delete the directory and build again")
    return manifest


def read_tokenizer(directory: epath.PathLike, manifest: Manifest | None = None) -> Tokenizer:
    """The tokenizer that the data was built with. Raises DataError if its file is not that one."""
    record = (manifest or read_manifest(directory)).tokenizer
    path = epath.Path(directory) / record.file
    tokenizer = load_tokenizer(record.kind, path)
    if tokenizer.fingerprint != record.fingerprint:
        raise DataError(f"{path}: not the tokenizer that the data was built with; build the data again")
    return tokenizer


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
