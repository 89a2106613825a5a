"""Files of tokens, written here as the trainers that they are of describe them."""

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lm.data import plan
from lm.data.build import build
from lm.data.config import DataConfig, SourceConfig, TokenizerConfig
from lm.data.sources import Ids, content_hash, cut, documents, list_files, tokens, whole
from lm.data.stream import TokenStream
from lm.data.tokenizers import BytesTokenizer
from lm.errors import DataError

BOS, EOS = 256, 257
IDS = Ids(BOS, EOS, 258, (BOS, EOS))
DOCUMENTS = [np.arange(i * 7, i * 7 + i % 23 + 1) % 256 for i in range(300)]

Documents = Sequence[np.ndarray]


def nanogpt(path: Path, documents: Documents, dtype: str = "<u2", end: int = EOS) -> None:
    """Each document and after it the end of text; nothing else."""
    path.write_bytes(np.concatenate([np.append(d, end) for d in documents]).astype(dtype).tobytes())


def llm_c(path: Path, documents: Documents, dtype: str = "<u2", begin: int = EOS) -> None:
    """256 int32 of header; before each document the end of text (GPT-2), or its begin (Llama 3)."""
    tokens = np.concatenate([np.append([begin], d) for d in documents]).astype(dtype)
    header = np.zeros(256, "<i4")
    header[:3] = (20240520, 1, len(tokens)) if dtype == "<u2" else (20240801, 7, len(tokens))
    path.write_bytes(header.tobytes() + tokens.tobytes())


def megatron(path: Path, documents: Documents, code: int = 8, sequences: Sequence[int] | None = None) -> None:
    """The tokens in x.bin; x.idx says where sequences begin, and which `sequences` begin documents."""
    dtype = {1: "<u1", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
    lengths = np.array([len(d) for d in documents])
    pointers = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    first = list(range(len(documents) + 1)) if sequences is None else sequences
    path.write_bytes(np.concatenate([*documents, []]).astype(dtype).tobytes())
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, code, len(documents), len(first))
        + lengths.astype("<i4").tobytes()
        + pointers.astype("<i8").tobytes()
        + np.array(first, "<i8").tobytes()
    )


def read(path: Path, tokens: str, limit: int | None = None, ids: Ids = IDS, skipped: Counter[str] | None = None):
    files = list_files([str(path)], tokens=tokens)
    pieces = [piece for file in files for piece in (cut(file, limit) if limit else [whole(file)])]
    counter = Counter() if skipped is None else skipped
    return [d for piece in pieces for d in documents(piece, "text", counter, ids=ids)]


def assert_same(found: Sequence, wanted: Documents) -> None:
    assert [d.tokens.tolist() for d in found] == [d.tolist() for d in wanted]


WRITERS = {
    "uint16": lambda path, d: nanogpt(path, d),
    "uint32": lambda path, d: nanogpt(path, d, "<u4"),
    "llm.c": lambda path, d: llm_c(path, d),
    "llm.c of Llama 3": lambda path, d: llm_c(path, d, "<u4", BOS),
    "megatron": lambda path, d: megatron(path, [np.append(one, EOS) for one in d]),
    "megatron without ends": lambda path, d: megatron(path, d, 4),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_same_tokens_arrive_in_order_however_the_file_is_cut(tmp_path: Path, writer: str) -> None:
    path, kind = tmp_path / "train.bin", writer.split()[0]
    WRITERS[writer](path, DOCUMENTS)
    assert_same(read(path, kind), DOCUMENTS)
    for limit in (9, 64, 1000, 1030, 4096):
        found = read(path, kind, limit)
        assert_same(found, DOCUMENTS)
        assert [d.raw for d in found] == [d.astype("<u4").tobytes() for d in DOCUMENTS]
    (file,) = list_files([str(path)], tokens=kind)
    for piece in cut(file, 1000):
        digest = hashlib.sha256()
        list(documents(piece, "text", Counter(), digest, ids=IDS))
        assert digest.hexdigest() == content_hash(piece)


def test_documents_longer_than_blocks_and_pieces(tmp_path: Path) -> None:
    long = [np.arange(n) % 256 for n in (300_001, 5, 1, 131_072, 262_144)]
    nanogpt(tmp_path / "a.bin", long)
    megatron(tmp_path / "b.bin", long)
    for name, kind in (("a.bin", "uint16"), ("b.bin", "megatron")):
        for limit in (None, 1000, 1 << 18):
            assert_same(read(tmp_path / name, kind, limit), long)


def test_inside_of_a_long_document_no_more_than_the_piece_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nanogpt(tmp_path / "x.bin", [np.zeros(1_000_000, int)])
    (file,) = list_files([str(tmp_path)], tokens="uint16")
    pieces = cut(file, 100_000)
    original, read = tokens.stored_blocks, Counter[str]()

    def counted(*of: object) -> Iterator[bytes]:
        for block in original(*of):
            read["bytes"] += len(block)
            yield block

    monkeypatch.setattr(tokens, "stored_blocks", counted)
    assert not list(documents(pieces[3], "text", Counter(), ids=IDS))
    assert read["bytes"] < 101_000


def test_what_stands_between_documents(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    np.array([EOS, BOS, 1, 2, EOS, BOS, 3, EOS, EOS, 4, 5], "<u2").tofile(path)
    wanted = [np.array(d) for d in ([1, 2], [3], [4, 5])]
    for limit in (None, 8):
        assert_same(read(path, "uint16", limit), wanted)
    np.array([1, 2, 9, BOS, 3, EOS, 9, 9, BOS, 9, 4], "<u2").tofile(path)
    skipped: Counter[str] = Counter()
    found = read(path, "uint16", ids=replace(IDS, separators=(9,)), skipped=skipped)
    assert_same(found, [np.array(d) for d in ([1, 2], [3], [4])])
    assert skipped == {"empty": 1}
    np.array([1, 2, 3], "<u2").tofile(path)  # as of a single text, without any end
    assert_same(read(path, "uint16"), [np.array([1, 2, 3])])


def test_documents_of_several_sequences_and_of_none(tmp_path: Path) -> None:
    parts = [np.array(p) for p in ([1, 2], [3], [], [4, EOS], [5])]
    megatron(tmp_path / "x.bin", parts, sequences=[0, 2, 2, 4, 5, 5])
    for limit in (None, 8):
        assert_same(read(tmp_path / "x.bin", "megatron", limit), [np.array(d) for d in ([1, 2, 3], [4], [5])])


def test_of_a_folder_the_token_files_are_taken(tmp_path: Path) -> None:
    nanogpt(tmp_path / "train.bin", DOCUMENTS)
    (tmp_path / "meta.pkl").write_bytes(b"\x80")
    assert_same(read(tmp_path, "uint16"), DOCUMENTS)
    with pytest.raises(DataError, match=r"train\.bin: seems to hold tokens; set data\.tokens to 'uint16'"):
        list(documents(whole(list_files([str(tmp_path / "train.bin")])[0]), "text", Counter()))
    (tmp_path / "train.bin").unlink()
    with pytest.raises(DataError, match=r"no \.bin files there"):
        list_files([str(tmp_path)], tokens="uint16")


def test_ids_beyond_the_vocabulary_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    tokens = np.concatenate([np.append(d, EOS) for d in DOCUMENTS]).astype("<u2")
    tokens[2000] = 258
    path.write_bytes(tokens.tobytes())
    for limit in (None, 512):
        with pytest.raises(DataError, match=r"x\.bin: token 2000 is 258, but the tokenizer has ids below 258"):
            read(path, "uint16", limit)
    assert len(read(path, "uint16", ids=replace(IDS, separators=(EOS, 258)))) > len(DOCUMENTS)
    megatron(path, [np.array([1, 2]), np.array([3, -4])], 4)
    with pytest.raises(DataError, match=r"x\.bin: token 3 is -4"):
        read(path, "megatron")


def test_files_that_are_not_what_the_config_says(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(1001))
    with pytest.raises(DataError, match=r"x\.bin: 1001 bytes are no whole number of uint16 tokens; truncated"):
        read(path, "uint16")
    with pytest.raises(DataError, match=r"x\.bin: not a file of tokens of llm\.c: begins with 0, 0"):
        read(path, "llm.c")
    path.write_bytes(b"")
    assert read(path, "uint16") == []
    with pytest.raises(DataError, match=r"x\.bin: not a file of tokens of llm\.c"):
        read(path, "llm.c")
    llm_c(path, DOCUMENTS)
    with pytest.raises(DataError, match=r"x\.bin: begins as files of llm\.c do; set data\.tokens to 'llm\.c'"):
        read(path, "uint16")
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"x\.bin: holds \d+ tokens, but should hold \d+; truncated\?"):
        read(path, "llm.c")
    path.write_bytes(content[:4] + b"\2" + content[5:])
    with pytest.raises(DataError, match=r"begins with 20240520, 2, not with"):
        read(path, "llm.c")


def test_broken_indices(tmp_path: Path) -> None:
    path, index = tmp_path / "x.bin", tmp_path / "x.idx"
    nanogpt(path, DOCUMENTS)
    with pytest.raises(DataError, match=r"x\.bin: has no index .*x\.idx"):
        read(path, "megatron")
    megatron(path, DOCUMENTS)
    with pytest.raises(DataError, match=r"x\.idx: has no index"):
        read(index, "megatron")
    good, tokens = index.read_bytes(), path.read_bytes()
    for content, message in [
        (b"", "not an index of Megatron-LM"),
        (b"text" * 20, "not an index of Megatron-LM"),
        (good[:9] + b"\2" + good[10:], "version 2, type of tokens 8; read are version 1"),
        (good[:17] + b"\7" + good[18:], "version 1, type of tokens 7"),
        (good[:-5], r"\d+ bytes are too few for 300 sequences; truncated"),
        (good[:-8] + bytes(8), "the documents are not made of all sequences"),
    ]:
        index.write_bytes(content)
        with pytest.raises(DataError, match=rf"x\.idx: {message}"):
            read(path, "megatron")
    pointer = 34 + 4 * 300 + 8 * 150
    index.write_bytes(good[:pointer] + bytes(8) + good[pointer + 8 :])
    with pytest.raises(DataError, match=r"x\.idx: the sequences do not lie one after the other"):
        read(path, "megatron")
    begin = 34 + 12 * 300 + 8 * 150
    for sequence in (10, 1 << 20):
        index.write_bytes(good[:begin] + sequence.to_bytes(8, "little") + good[begin + 8 :])
        with pytest.raises(DataError, match=r"x\.idx: the documents do not follow each other"):
            read(path, "megatron")
    index.write_bytes(good)
    path.write_bytes(tokens[:-2])
    with pytest.raises(DataError, match=r"x\.idx: is of a \.bin file of \d+ bytes, but that has \d+; truncated"):
        read(path, "megatron")


def stream(folder: Path, split: str = "train") -> list[int]:
    tokens = TokenStream(folder, split)
    return tokens.read(0, tokens.tokens)[0].tolist()


@pytest.mark.parametrize("writer", WRITERS)
def test_build_gives_what_the_text_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 3000)
    texts = [f"{i}: " + "naïve 😀" * (i % 40) for i in range(200)]
    for split, chosen in (("train", texts[20:]), ("heldout", texts[:20])):
        for i, text in enumerate(chosen):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / f"{i:03}.txt").write_text(text)
        WRITERS[writer](tmp_path / f"{split}.bin", BytesTokenizer().encode_batch(chosen))
    tokenizer = TokenizerConfig("bytes")
    text = DataConfig((str(tmp_path / "train"),), holdout_paths=(str(tmp_path / "heldout"),), tokenizer=tokenizer)
    tokens = replace(
        text,
        paths=(str(tmp_path / "train.bin"),),
        holdout_paths=(str(tmp_path / "heldout.bin"),),
        tokens=writer.split()[0],
    )
    of_text = build(replace(text, workers=1), tmp_path / "text-data", print)
    of_tokens = build(replace(tokens, workers=1), tmp_path / "token-data", print)
    for split in ("train", "heldout"):
        assert stream(tmp_path / "token-data", split) == stream(tmp_path / "text-data", split)
        assert of_tokens.text_bytes(split) == of_text.text_bytes(split)
    assert len(of_tokens.splits["train"]) > 2
    assert sum(source.documents for source in of_tokens.sources.values()) == len(texts)


def test_build_in_parallel_held_out_by_document_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 1000)
    megatron(tmp_path / "x.bin", DOCUMENTS)
    config = DataConfig(
        (str(tmp_path / "x.bin"),), tokens="megatron", tokenizer=TokenizerConfig("bytes"), holdout_fraction=0.1
    )
    one = build(replace(config, workers=1), tmp_path / "one", print)
    two = build(replace(config, workers=2), tmp_path / "two", print)
    assert one == two
    assert one.documents("train") + one.documents("heldout") == len(DOCUMENTS)
    # As wide or as narrow as a file holds them, the same documents are held out.
    nanogpt(tmp_path / "y.bin", DOCUMENTS, "<u4")
    flat = replace(config, paths=(str(tmp_path / "y.bin"),), tokens="uint32", workers=1)
    build(flat, tmp_path / "three", print)
    assert stream(tmp_path / "three", "heldout") == stream(tmp_path / "one", "heldout")
    # Documents that begin elsewhere are another source, though no byte of the tokens is another.
    for name in ("manifest.json", "part-00001.json"):
        (tmp_path / "one" / name).unlink()
    first = [0, *range(2, len(DOCUMENTS) + 1)]
    megatron(tmp_path / "x.bin", DOCUMENTS, sequences=first)
    with pytest.raises(DataError, match=r"x\.bin: other content, of the same size"):
        build(replace(config, workers=1), tmp_path / "one", print)


def test_tail_of_a_single_document(tmp_path: Path) -> None:
    np.arange(100, dtype="<u2").tofile(tmp_path / "x.bin")
    config = DataConfig(
        (str(tmp_path),), tokens="uint16", tokenizer=TokenizerConfig("bytes"), holdout_by="tail", holdout_fraction=0.1
    )
    build(replace(config, workers=1), tmp_path / "data", print)
    assert stream(tmp_path / "data") == [BOS, *range(90), EOS]
    assert stream(tmp_path / "data", "heldout") == [BOS, *range(90, 100), EOS]


def test_config() -> None:
    def problems(**fields: object) -> dict[str, str]:
        return dict(DataConfig(("x.bin",), **{"tokenizer": TokenizerConfig("bytes"), **fields}).check())

    assert not problems(tokens="uint16", separator=9)
    assert "made with" in problems(tokens="uint16", tokenizer=TokenizerConfig())["tokenizer.path"]
    assert "leave one" in problems(tokens="uint16", filter="a:b")["filter"]
    assert "without an index" in problems(separator=9)["separator"]
    assert "without an index" in problems(separator=9, tokens="megatron")["separator"]
    several = DataConfig(sources=(SourceConfig("a", ("x.bin",), tokens="llm.c"),))
    assert "made with" in dict(several.check())["tokenizer.path"]
    assert several.of(several.sources[0]).tokens == "llm.c"
