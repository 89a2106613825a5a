"""`lm data find`: where a text is, and in which steps it was read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from lm.data import find as finding
from lm.data import records, scan
from lm.data.batches import Batches
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.corpus import Corpus, open_corpus
from lm.data.files import write_json
from lm.data.find import Found, Hit, find, lines
from lm.data.manifest import FILE, Manifest, TokenizerRecord
from lm.data.records import ShardWriter
from lm.data.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer
from lm.errors import ConfigError

Write = Callable[..., Corpus]


def look(corpus: Corpus, text: str, steps: int = 20, limit: int = 100, rows: int = 4, length: int = 16) -> Found:
    return find(Batches(corpus, rows, length, seed=3), text, steps, limit, lambda line: None)


def scanned(batches: Batches, hit: Hit, steps: int) -> list[tuple[int, int, int]]:
    """(step, row, tokens of the hit in it), by looking at every row."""
    names = [one.title for one in batches.corpus.sources]
    size = batches.streams[names.index(hit.source)].tokens
    wanted = {(hit.position + i) % size for i in range(hit.tokens)}
    found = []
    for step in range(steps):
        for number, row in enumerate(batches.rows(step)):
            if names[row.source] == hit.source:
                held = [(start + i) % size for start, length in row.spans for i in range(length)]
                if count := sum(position in wanted for position in held):
                    found.append((step, number, count))
    return found


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@pytest.mark.parametrize("text", ["number 2", " we", "code number 3 ", "s number", "b"])
def test_every_step_that_read_it(mixed: Write, packing: str, text: str) -> None:
    corpus = mixed(packing=packing)
    batches = Batches(corpus, 4, 16, seed=3)
    found = look(corpus, text, limit=1000)
    hits = 0
    for number, one in enumerate(corpus.sources):
        stream = batches.streams[number]
        everything = bytes(t if t < 256 else 0 for t in stream.read(0, stream.tokens)[0].tolist())
        own = [hit for hit in found.hits if hit.source == one.name]
        assert everything.count(text.encode()) == len(own) == found.times["train"].get(one.name, 0)
        for hit in own:
            assert everything[hit.position : hit.position + hit.tokens] == text.encode()
            assert stream.document(hit.position) == hit.document
            around = hit.before + hit.found + hit.after
            assert around.encode() in everything
            assert f"{one.name} number {hit.document} ".startswith(around[: len(one.name) + 9])
        hits += len(own)
    assert hits == len(found.hits) > 0
    for hit in found.hits[:: max(1, hits // 8)]:
        assert [(one.step, one.row, one.tokens) for one in hit.readings] == scanned(batches, hit, 20)
    if packing == "split" and len(text) > 1:
        assert any(one.tokens < hit.tokens for hit in found.hits for one in hit.readings)
    assert any(len({one.step for one in hit.readings}) > 1 for hit in found.hits)


def test_the_same_step_that_shows_it(mixed: Write) -> None:
    from lm.data.show import show

    corpus = mixed()
    [hit] = look(corpus, "books number 4", length=64).hits
    batches = Batches(corpus, 4, 64, seed=3)
    assert hit.readings
    for one in hit.readings:
        if one.tokens == hit.tokens:
            text = "".join(show(batches, one.step, slice(one.row, one.row + 1)))
            assert "ooks number 4" in text.replace("⟦", "").replace("⟧", "")


@pytest.mark.usefixtures("small_records")
def test_it_may_lie_across_records_but_not_across_documents(
    write_texts: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of 16 tokens, of which one or two are in view at once."""
    text = "".join(chr(0x41 + i % 50) for i in range(200))
    texts = [text, "ends with éa", "b begins", "aaaa" * 8]
    corpus = write_texts({"": texts})
    for in_view in (1, 2, 64):
        monkeypatch.setattr(finding, "_RECORDS", in_view)
        for start in range(0, 190, 17):
            for count in (1, 15, 40):
                wanted = text[start : start + count]
                assert look(corpus, wanted).times["train"]["data"] == sum(one.count(wanted) for one in texts)
        whole = look(corpus, text)
        assert (whole.hits[0].position, whole.hits[0].tokens) == (1, 200)
        assert look(corpus, "éa").hits[0].document == 1
        assert look(corpus, "éab").times == {"train": {}, "heldout": {}}
        assert look(corpus, "aaa").times["train"] == {"data": 10}  # without overlap
        assert [hit.position for hit in look(corpus, "aaa").hits] == [228 + 3 * i for i in range(10)]


def test_documents_without_specials_are_apart_too(write_data: Callable[..., Path]) -> None:
    corpus = open_corpus(write_data([[np.array([*b"one tw"]), np.array([*b"o two"])]]))
    assert look(corpus, "two").times["train"] == {"data": 1}
    assert look(corpus, "tw").times["train"] == {"data": 2}


def stored(tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, folder: Path, texts: list[str]) -> Corpus:
    folder.mkdir()
    writer = ShardWriter(epath.Path(folder / "train-00000.array_record"), np.dtype(np.uint16))
    for text in texts:
        writer.add(np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]), len(text.encode()))
    (folder / tokenizer.file_name).write_bytes(tokenizer.serialize())
    record = TokenizerRecord(tokenizer.kind, tokenizer.file_name, tokenizer.fingerprint, tokenizer.vocab_size)
    write_json(epath.Path(folder / FILE), Manifest(record, {}, {"train": (writer.close(),), "heldout": ()}).to_dict())
    return open_corpus(folder)


def test_it_does_not_matter_how_text_falls_into_tokens(
    bpe: SentencePieceTokenizer, byte_level: HuggingFaceTokenizer, tmp_path: Path
) -> None:
    texts = ["def function_1(argument): return 日本 [é]", "    return x\n" * 20]
    for tokenizer in (bpe, byte_level):
        corpus = stored(tokenizer, tmp_path / tokenizer.kind, texts)
        for text in texts:
            for start in range(0, len(text) - 12, 8):
                wanted = text[start : start + 12]
                found = look(corpus, wanted, limit=3)
                assert sum(found.times["train"].values()) == sum(one.count(wanted) for one in texts)
                assert all(hit.found == wanted and hit.before + hit.found in "".join(texts) for hit in found.hits)


def test_a_space_that_a_tokenizer_adds_is_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    text = ["hello world and more of the same text", "world of hello text"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 5),
        model_writer=model,
        model_type="char",
        vocab_size=40,
        hard_vocab_limit=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    monkeypatch.setattr(finding, "_RECORDS", 1)
    for size in (*range(1, 8), records.RECORD_TOKENS):  # the space may begin a record
        monkeypatch.setattr(records, "RECORD_TOKENS", size)
        tokenizer = SentencePieceTokenizer(model.getvalue())
        corpus = stored(tokenizer, tmp_path / f"{size}", ["hello world", "world hello"])
        assert corpus.tokenizer.added == b" "
        assert look(corpus, " hello", limit=0).times["train"] == {"data": 1}
        assert look(corpus, "hello", limit=0).times["train"] == {"data": 2}
        assert look(corpus, " ", limit=0).times["train"] == {"data": 2}


def test_processes_find_what_one_finds(write_texts: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = write_texts({"": [f"document {i} of many" for i in range(30)]}, workers=2)
    alone = look(corpus, "of many", limit=7)
    monkeypatch.setattr(scan, "_ALONE_BYTES", 0)
    said: list[str] = []
    together = find(Batches(corpus, 4, 16, seed=3), "of many", 20, 7, said.append)
    assert together == alone
    assert [hit.document for hit in together.hits] == list(range(7))
    assert said[-1].startswith("searching what is trained on: ")


def test_only_held_out_or_nowhere_is_said(mixed: Write) -> None:
    corpus = mixed()
    [line] = lines(look(corpus, "only held"))
    assert line == "“only held” is not in what is trained on; it is only in what is held out, once"
    [line] = lines(look(corpus, "nothing of the kind"))
    assert line == "“nothing of the kind” is not in what is trained on, nor in what is held out"
    first, *_ = lines(look(corpus, "n"))
    assert first.startswith("“n”: 44 times in what is trained on (web 30, code 9, books 5), in 44 documents")
    assert first.endswith(", and once in what is held out")


def test_what_is_printed(write_texts: Write) -> None:
    corpus = write_texts({"": ["before\nthe \x1bneedle after", *("hay" for _ in range(40))]})
    found = look(corpus, "\x1bneedle", steps=1)
    first, where, steps = lines(found)
    assert first == "“\\x1bneedle”: once in what is trained on, in 1 document"
    assert where == "── data, document 0: …before\\nthe ⟪\\x1bneedle⟫ after…"
    assert steps == "   not read before step 1" or steps.startswith("   read in step 0 row ")
    *_, more = lines(look(corpus, "hay", limit=3))
    assert more == "and 37 more; --limit N shows the first N"
    assert len(list(lines(look(corpus, "hay", limit=0)))) == 2


def test_nothing_is_read_of_a_source_that_is_not_in_the_run(mixed: Write) -> None:
    corpus = mixed()
    assert look(corpus, "books number 1", steps=8).hits[0].readings == []
    assert look(corpus, "books number 1", steps=40).hits[0].readings[0].step >= 8


@pytest.mark.parametrize(("text", "limit", "said"), [("", 5, "is empty"), ("a", -1, "--limit must be at least 0")])
def test_what_cannot_be_found(mixed: Write, text: str, limit: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        look(mixed(), text, limit=limit)


def test_text_of_a_real_build(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / "text" / f"{i:02}.txt").write_text(f"file {i}: " + f"some words of it, {i}\n" * 20)
    config = DataConfig((str(tmp_path / "text"),), tokenizer=TokenizerConfig(vocab_size=300), workers=1)
    build(config, tmp_path / "data", lambda line: None)
    found = look(open_corpus(tmp_path / "data", config), "words of it, 7\nsome words of it, 7\n", steps=200)
    times = {split: sum(found.times[split].values()) for split in found.times}
    assert sorted(times.values()) == [0, 10]
    assert all(hit.readings for hit in found.hits)
