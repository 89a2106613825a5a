"""Small data directories to read from."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from lm.data import records, stream
from lm.data.files import write_json
from lm.data.manifest import FILE, Manifest, TokenizerRecord
from lm.data.records import Shard, ShardWriter
from lm.data.tokenizers import BytesTokenizer

Documents = Sequence[np.ndarray]


@pytest.fixture
def small_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of 16 tokens, so that short streams have many edges."""
    monkeypatch.setattr(records, "RECORD_TOKENS", 16)
    monkeypatch.setattr(stream, "RECORD_TOKENS", 16)


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes shards of documents, each the int [n] tokens with specials, as a data directory."""

    def write(train: Sequence[Documents], heldout: Sequence[Documents] = (), name: str = "data") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        splits: dict[str, tuple[Shard, ...]] = {}
        for split, shards in (("train", train), ("heldout", heldout)):
            written = []
            for number, documents in enumerate(shards):
                path = epath.Path(folder / f"{split}-{number:05d}.array_record")
                writer = ShardWriter(path, np.dtype(np.uint16))
                for document in documents:
                    writer.add(document, int((document < 256).sum()))
                written.append(writer.close())
            splits[split] = tuple(written)
        tokenizer = BytesTokenizer()
        (folder / tokenizer.file_name).write_bytes(tokenizer.serialize())
        record = TokenizerRecord("bytes", tokenizer.file_name, tokenizer.fingerprint, tokenizer.vocab_size)
        write_json(epath.Path(folder / FILE), Manifest(record, {}, splits).to_dict())
        return folder

    return write
