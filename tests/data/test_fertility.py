"""`lm data tokenizer`: the tokenizer that a build makes, and what it does with text that it has not seen."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers as hf

from lm.cli import main
from lm.data import plan, vocabulary
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.fertility import lines, measure, report
from lm.data.manifest import read_tokenizer
from lm.data.plan import divide, part_bytes
from lm.data.sources import list_files
from lm.data.splits import holdout_below
from lm.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer, load_tokenizer, train_sentencepiece
from lm.data.vocabulary import Sample, unseen_text


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources of several parts: `a`, of 40 files, and `b`, of one .jsonl file of 400 documents."""
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 20_000)
    (tmp_path / "a").mkdir()
    for i in range(40):
        (tmp_path / "a" / f"{i:02}.txt").write_text("".join(f"file {i} has line {j}\n" for j in range(300)))
    rows = (json.dumps({"text": f"rów {i}: " + "日本 text " * (i % 30)}) + "\n" for i in range(400))
    (tmp_path / "b.jsonl").write_text("".join(rows))
    return tmp_path


def config(corpus: Path, **changes: object) -> DataConfig:
    small = TokenizerConfig(vocab_size=400, training_bytes=40_000)
    paths = (str(corpus / "a"), str(corpus / "b.jsonl"))
    return replace(DataConfig(paths, holdout_fraction=0.2, tokenizer=small), **changes)


def unseen(chosen: DataConfig, size: int) -> list[tuple[str, str]]:
    listed = list_files(chosen.paths, chosen.holdout_paths)
    parts = divide(listed, part_bytes(listed))
    return list(unseen_text([Sample(chosen, parts, holdout_below(chosen, parts))], size))


@pytest.mark.parametrize("model_type", ["bpe", "unigram", "char"])
def test_makes_the_tokenizer_that_a_build_makes(corpus: Path, model_type: str) -> None:
    chosen = config(corpus)
    chosen = replace(chosen, tokenizer=replace(chosen.tokenizer, model_type=model_type))
    build(chosen, corpus / "data", lambda line: None)
    said: list[str] = []
    assert report(chosen, said.append).fingerprint == read_tokenizer(corpus / "data").fingerprint
    assert any(line.startswith("  all of them ") for line in said)


@pytest.mark.parametrize("changes", [{}, {"holdout_by": "tail"}, {"holdout_fraction": 0.0}])
def test_text_of_the_report_is_not_of_the_sample(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    sampled: list[str] = []
    monkeypatch.setattr(
        vocabulary, "train_sentencepiece", lambda texts, **options: sampled.extend(texts) or BytesTokenizer()
    )
    chosen = config(corpus, **changes)
    report(chosen, lambda line: None)
    texts = unseen(chosen, 1 << 30)
    assert len(sampled) > 5
    assert {source for source, _ in texts} == set(chosen.paths)
    assert not {text for _, text in texts} & set(sampled)


def test_each_source_gives_its_share(corpus: Path) -> None:
    chosen = config(corpus)
    sizes = Counter[str]()
    for source, text in unseen(chosen, 20_000):
        sizes[source] += len(text.encode())
    whole = [sum(f.size for f in list_files([source])) for source in chosen.paths]
    for source, size in zip(chosen.paths, whole, strict=True):
        assert abs(sizes[source] - 20_000 * size / sum(whole)) <= 4096  # a stretch more, or what held-out text lacks
    assert unseen(chosen, 20_000) == unseen(chosen, 20_000)


def test_named_held_out_files_are_what_is_measured(corpus: Path) -> None:
    chosen = config(corpus, holdout_paths=(str(corpus / "b.jsonl"),))
    assert {source for source, _ in unseen(chosen, 10_000)} == {str(corpus / "b.jsonl")}


def test_nothing_left_to_measure(corpus: Path) -> None:
    chosen = config(corpus, holdout_fraction=0.0)
    chosen = replace(chosen, tokenizer=replace(chosen.tokenizer, training_bytes=1 << 30))
    said: list[str] = []
    report(chosen, said.append)
    assert said[-1].startswith("no report: no text was kept from its training")
    report(replace(chosen, tokenizer=TokenizerConfig(kind="bytes")), said.append)
    assert said[-1].endswith("texts came back as they were")


def test_counts() -> None:
    texts = [("one", "ab c\n"), ("one", " é"), ("two", "日本")]
    counts, changes = measure(BytesTokenizer(), texts)
    assert counts["one"] == {"texts": 2, "bytes": 8, "words": 3, "tokens": 8, "byte_tokens": 2, "unknown": 0}
    assert counts["two"] == {"texts": 1, "bytes": 6, "words": 1, "tokens": 6, "byte_tokens": 6, "unknown": 0}
    assert changes == []
    letters = train_sentencepiece(["abc"], model_type="char", vocab_size=9)
    counts, changes = measure(letters, [("s", "abéc")])
    assert counts["s"] == {"texts": 1, "bytes": 5, "words": 1, "tokens": 4, "byte_tokens": 0, "unknown": 1}
    assert changes == ["s: 'abéc' became 'abc'"]
    assert (
        list(lines(counts, changes))[-1] == "1 of 1 texts did not come back as they were; the first, from " + changes[0]
    )


def test_byte_tokens_of_pieces_and_of_byte_level(code: list[str], byte_level: HuggingFaceTokenizer) -> None:
    pieces = train_sentencepiece(code, model_type="bpe", vocab_size=400)
    for tokenizer in (pieces, byte_level):
        counts, _ = measure(tokenizer, [("s", "def 日")])
        assert counts["s"]["byte_tokens"] == 3
    counts, _ = measure(pieces, [("s", "\0")])  # no piece for it, though it is a whole character
    assert counts["s"]["byte_tokens"] == counts["s"]["tokens"] == 1


def test_text_that_a_tokenizer_changes_is_shown() -> None:
    model = hf.Tokenizer(
        hf.models.BPE({p: i for i, p in enumerate(["<s>", *(hf.pre_tokenizers.ByteLevel.alphabet())])}, [])
    )
    model.normalizer = hf.normalizers.NFC()
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    tokenizer = load_tokenizer("huggingface", model.to_str().encode())
    _, changes = measure(tokenizer, [("s", "same"), ("s", "x" * 50 + "cafe\u0301 noir" + "y" * 50)])
    assert changes == ["s: 'xxxxxxxcafe\u0301 noiryyy' became 'xxxxxxxcafé noiryyyy'"]


def test_command(corpus: Path, capsys: pytest.CaptureFixture[str], gpt2_folder: Path) -> None:
    (corpus / "c.json").write_text("{}")
    common = [str(corpus / "c.json"), "--data.paths", str(corpus / "b.jsonl"), "--data.holdout_fraction=0.2"]
    trained = ["data", "tokenizer", *common, "--data.tokenizer.vocab_size=290", "--model.vocab_size=290"]
    out = corpus / "out" / "my.model"
    assert main([*trained, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "sentencepiece: 290 tokens; a document begins with <s> and ends with </s>" in said
    assert "came back as they were" in said
    assert main(["data", "tokenizer", *common, f"--data.tokenizer.path={out}"]) == 0
    assert said.splitlines()[1:-1] == capsys.readouterr().out.splitlines()  # the same on the same text
    gpt2 = ["data", "tokenizer", *common, "--data.tokenizer.kind=gpt2"]
    assert main([*gpt2, f"--data.tokenizer.path={gpt2_folder}", "--out", str(out)]) == 0
    assert main([*gpt2, f"--data.tokenizer.path={out}"]) == 0
    assert main(gpt2) == 2
    assert "must name a folder with vocab.json and merges.txt" in capsys.readouterr().err
    assert main([*gpt2, "--data.tokenizer.path=nowhere"]) == 3
    assert "nowhere: cannot read the tokenizer" in capsys.readouterr().err
    assert main([*trained, "--out", str(corpus / "a")]) == 5


def test_a_build_keeps_and_reads_tokenizers_of_files(corpus: Path, gpt2_folder: Path, llama3_file: Path) -> None:
    for kind, path in (("gpt2", gpt2_folder), ("llama3", llama3_file)):
        chosen = config(corpus, tokenizer=TokenizerConfig(kind=kind, path=str(path)), workers=1)
        build(chosen, corpus / kind, lambda line: None)
        build(chosen, corpus / kind, lambda line: None)
        assert read_tokenizer(corpus / kind).fingerprint == load_tokenizer(kind, path).fingerprint
