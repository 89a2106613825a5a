"""Small data directories to read from, and a small tokenizer of each kind."""

import base64
import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
from etils import epath

from lm.data import records, stream
from lm.data.config import DataConfig, PhaseConfig, SourceConfig
from lm.data.corpus import Corpus, open_corpus
from lm.data.files import write_json
from lm.data.manifest import FILE, Manifest, TokenizerRecord, read_tokenizer
from lm.data.records import Shard, ShardWriter
from lm.data.tokenizers import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from lm.data.tokenizers.byte_level import byte_level_bytes

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


@pytest.fixture(scope="session")
def documents() -> Callable[[Path, str], list[str]]:
    """All texts of a split of a data directory, read back from the built files."""

    def read(folder: Path, split: str) -> list[str]:
        shards = stream.TokenStream(folder, split)
        tokenizer = read_tokenizer(folder)
        tokens, begins = shards.read(0, shards.tokens)
        starts = [*np.flatnonzero(begins).tolist(), shards.tokens]
        found = [tokens[a:b] for a, b in itertools.pairwise(starts)]
        assert all(ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id for ids in found)
        return [tokenizer.decode(ids) for ids in found]

    return read


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, str]]:
    """The hash of each file in a data directory, but for locks."""

    def hashes(folder: Path) -> dict[str, str]:
        found = [path for path in sorted(folder.iterdir()) if path.suffix != ".lock"]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}

    return hashes


@pytest.fixture(scope="session")
def code() -> list[str]:
    """Text to train small tokenizers on."""
    return [
        f"def function_{i}(argument, other):\n    if argument > {i}:\n        return other[{i}]\n\n" for i in range(50)
    ]


@pytest.fixture(scope="session")
def bpe(code: list[str]) -> SentencePieceTokenizer:
    return train_sentencepiece(code, model_type="bpe", vocab_size=400)


@pytest.fixture(scope="session")
def unigram(code: list[str]) -> SentencePieceTokenizer:
    return train_sentencepiece(code, model_type="unigram", vocab_size=320)


@pytest.fixture(scope="session")
def library_model(code: list[str]) -> hf.Tokenizer:
    """Byte-level BPE by the tokenizers library, split as GPT-2 does."""
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(code, trainer)
    return model


@pytest.fixture(scope="session")
def byte_level(library_model: hf.Tokenizer) -> HuggingFaceTokenizer:
    model = hf.Tokenizer.from_str(library_model.to_str())
    model.add_tokens(["    "])
    return HuggingFaceTokenizer(model.to_str().encode())


@pytest.fixture(scope="session")
def gpt2_folder(library_model: hf.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt, as the library writes them."""
    folder = tmp_path_factory.mktemp("gpt2")
    library_model.model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def llama3_file(library_model: hf.Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same vocabulary as ranks."""
    pieces = sorted(library_model.get_vocab(), key=library_model.get_vocab().__getitem__)
    words = [byte_level_bytes(piece, "") for piece in pieces if piece != "<|endoftext|>"]
    path = tmp_path_factory.mktemp("llama3") / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words)))
    return path


@pytest.fixture(params=["bytes", "bpe", "unigram", "byte_level", "gpt2", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    match request.param:
        case "bytes":
            return BytesTokenizer()
        case "gpt2":
            return load_tokenizer("gpt2", request.getfixturevalue("gpt2_folder"))
        case "llama3":
            return load_tokenizer("llama3", request.getfixturevalue("llama3_file"))
        case fixture:
            return request.getfixturevalue(fixture)


Texts = dict[str, list[str]]


@pytest.fixture
def write_texts(write_data: Callable[..., Path], tmp_path: Path) -> Callable[..., Corpus]:
    """Makes a corpus of the documents of each source, as bytes, in shards of three; `changes` are of its DataConfig."""

    def shards(texts: list[str]) -> list[Documents]:
        documents = [np.array([256, *text.encode(), 257]) for text in texts]
        return [documents[i : i + 3] for i in range(0, len(documents), 3)]

    def write(train: Texts, heldout: Texts | None = None, **changes: Any) -> Corpus:
        held = heldout or {}
        found = [
            SourceConfig(name, dir=str(write_data(shards(texts), shards(held.get(name, [])), name=name or "data")))
            for name, texts in train.items()
            if name
        ]
        if not found:
            return open_corpus(write_data(shards(train[""]), shards(held.get("", []))), DataConfig(**changes))
        return open_corpus(tmp_path, DataConfig(sources=tuple(found), **changes))

    return write


MIXTURE = (
    PhaseConfig(0, (("web", 0.5), ("code", 0.5))),
    PhaseConfig(8, (("web", 0.25), ("code", 0.25), ("books", 0.5))),
)


@pytest.fixture
def mixed(write_texts: Callable[..., Corpus]) -> Callable[..., Corpus]:
    """Three sources, mixed in two phases; packing and the like as options. Document i of a source says so."""

    def make(**changes: Any) -> Corpus:
        words = {"web": 30, "code": 9, "books": 5}
        texts = {
            name: [f"{name} number {i} " + f"{name[:2]} " * (7 * i % 13) for i in range(count)]
            for name, count in words.items()
        }
        return write_texts(texts, {"web": ["only held out"]}, **{"mixture": MIXTURE, **changes})

    return make
