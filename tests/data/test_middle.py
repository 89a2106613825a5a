"""Fill in the middle, from the text of a document to what a run is shown."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from lm.data import plan
from lm.data.batches import Batches
from lm.data.build import build
from lm.data.config import DataConfig, SourceConfig, TokenizerConfig
from lm.data.corpus import build_corpus, open_corpus
from lm.data.manifest import read_tokenizer
from lm.data.middle import TRAINED_NAMES, Cut, cut, encode_cut, find_sentinels
from lm.data.show import show
from lm.data.stream import TokenStream
from lm.data.tokenizers import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from lm.errors import ConfigError

TEXTS = ["def f(x):\n    return x", "日本語 text\t😀 end\n", "a", "", "  two  spaces ▁ <fim_prefix> <|fim_middle|>"]


def quiet(message: str) -> None:
    pass


@pytest.fixture(scope="module")
def with_fim(code: list[str]) -> SentencePieceTokenizer:
    return train_sentencepiece(code, model_type="bpe", vocab_size=400, specials=TRAINED_NAMES)


@pytest.fixture(scope="module")
def qwen_like(library_model: hf.Tokenizer) -> HuggingFaceTokenizer:
    """The marks are in the file, but not as special: its library would find them in text."""
    model = hf.Tokenizer.from_str(library_model.to_str())
    model.add_tokens([f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix")])
    assert not any(t["special"] for t in json.loads(model.to_str())["added_tokens"] if "fim" in t["content"])
    return HuggingFaceTokenizer(model.to_str().encode())


@pytest.fixture(scope="module")
def llama_like(code: list[str], tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    """A model that puts a space before a text."""
    prefix = str(tmp_path_factory.mktemp("llama") / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in code for line in text.split("\n") if line]),
        model_prefix=prefix, vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        control_symbols=["▁<PRE>", "▁<SUF>", "▁<MID>"],
    )  # fmt: skip
    tokenizer = load_tokenizer("sentencepiece", prefix + ".model")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.piece(tokenizer.encode("a")[0]).startswith(" ")
    return tokenizer


@pytest.mark.parametrize("suffix_first", [False, True])
@pytest.mark.parametrize("kind", ["with_fim", "qwen_like", "llama_like"])
def test_parts_in_their_old_order_give_the_text_back(
    kind: str, suffix_first: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    sentinels = find_sentinels(tokenizer, None)
    before, between, last = sentinels
    draw = random.Random(0)
    for text in TEXTS:
        if kind == "llama_like":
            text = text.replace("▁", "_")  # which such a model reads as a space
        for _ in range(8):
            start, stop = sorted(draw.choices(range(len(text) + 1), k=2))
            (ids,) = encode_cut(tokenizer, [text], [Cut(start, stop, suffix_first)], sentinels)
            found = ids.tolist()
            a, b = found.index(between), found.index(last)
            assert found[0] == before
            assert len([i for i in found if i in sentinels]) == 3  # what spells them in the text is text
            # Not at the front, where decoding takes a space off.
            line = tokenizer.encode("\n").tolist()
            raw = [tokenizer.decode(line + part)[1:] for part in (found[1:a], found[a + 1 : b], found[b + 1 :])]
            prefix, middle, suffix = text[:start], text[start:stop], text[stop:]
            if kind == "llama_like" and prefix:
                prefix = f" {prefix}"
            assert raw == (["", suffix, prefix + middle] if suffix_first else [prefix, suffix, middle])


def test_order_of_the_paper(with_fim: SentencePieceTokenizer) -> None:
    text, sentinels = "abcdef", find_sentinels(with_fim, None)
    psm, spm, plain = encode_cut(
        with_fim, [text] * 3, [Cut(2, 4, suffix_first=False), Cut(2, 4, suffix_first=True), None], sentinels
    )

    def shown(ids: np.ndarray) -> str:
        return "".join(with_fim.piece(i) for i in ids.tolist())

    assert shown(psm) == "<fim_prefix>ab<fim_suffix>ef<fim_middle>cd"
    assert shown(spm) == "<fim_prefix><fim_suffix>ef<fim_middle>abcd"
    assert shown(plain) == "abcdef"


def test_places_are_drawn_evenly_among_characters_and_orders() -> None:
    texts = [f"{i:08}" for i in range(4000)]
    cuts = [found for text in texts if (found := cut(text, 0.5)) is not None]
    assert 0.47 < len(cuts) / len(texts) < 0.53
    assert 0.46 < sum(c.suffix_first for c in cuts) / len(cuts) < 0.54
    places = np.bincount([place for c in cuts for place in (c.start, c.stop)], minlength=9) / (2 * len(cuts))
    assert len(places) == 9
    assert np.abs(places - 1 / 9).max() < 0.02
    assert all(c.start <= c.stop for c in cuts)
    assert [cut(text, 0.5) for text in texts] == [cut(text, 0.5) for text in texts]
    assert all(cut(text, 1) is not None and cut(text, 0) is None for text in texts[:100])
    assert cut("\ud800 lone", 1) is not None
    assert cut("pinned", 1) == Cut(1, 3, suffix_first=True)  # other places would not be those of what was built


def write_rows(folder: Path, count: int = 400) -> list[str]:
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "\n", "    ", "é", "日本", "😀", "x = 1\n", "<fim_middle>"]
    rows = [f"{i} " + " ".join(draw.choices(words, k=draw.randrange(1, 60))) for i in range(count)]
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return rows


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 20_000)
    write_rows(tmp_path / "rows")
    return DataConfig(
        paths=(str(tmp_path / "rows"),),
        tokenizer=TokenizerConfig(vocab_size=400),
        holdout_fraction=0.1,
        workers=1,
        fim_rate=0.5,
    )


def documents(folder: Path, split: str) -> list[np.ndarray]:
    """Ids of each, without begin and end."""
    stream = TokenStream(folder, split)
    tokens, begins = stream.read(0, stream.tokens)
    return [tokens[a + 1 : b - 1] for a, b in itertools.pairwise([*np.flatnonzero(begins).tolist(), stream.tokens])]


def test_built_documents_are_those_of_the_text(config: DataConfig, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    manifest = build(config, tmp_path / "data", quiet)
    tokenizer = read_tokenizer(tmp_path / "data")
    before, between, last = find_sentinels(tokenizer, None)
    texts, filled = [], 0
    for ids in (found.tolist() for found in documents(tmp_path / "data", "train")):
        if before not in ids:
            assert between not in ids
            assert last not in ids
            texts.append(tokenizer.decode(ids))
            continue
        filled += 1
        a, b = ids.index(between), ids.index(last)
        one, two, three = (tokenizer.decode(part) for part in (ids[1:a], ids[a + 1 : b], ids[b + 1 :]))
        # With nothing before <suffix>, both orders read the same, up to where prefix and middle meet.
        texts.append(one + three + two)
    heldout = documents(tmp_path / "data", "heldout")
    assert not {before, between, last} & {i for ids in heldout for i in ids.tolist()}
    assert sorted(texts + [tokenizer.decode(ids) for ids in heldout]) == sorted(rows)
    (source,) = manifest.sources.values()
    assert source.fim_documents == filled
    assert 0.4 < filled / manifest.documents("train") < 0.6
    assert manifest.text_bytes("train") == sum(len(text.encode()) for text in texts)
    assert source.tokens == manifest.tokens("train") + manifest.tokens("heldout")


def test_workers_and_parts_do_not_change_it(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(config, tmp_path / "one", quiet)
    assert build(replace(config, workers=2), tmp_path / "two", quiet) == one
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 1 << 20)
    monkeypatch.setattr(plan, "MAX_PART_BYTES", 1 << 20)
    build(config, tmp_path / "three", quiet)
    a, b = (documents(tmp_path / name, "train") for name in ("one", "three"))
    assert [ids.tolist() for ids in a] == [ids.tolist() for ids in b]


def test_without_it_plan_and_tokenizer_are_as_ever(config: DataConfig, tmp_path: Path) -> None:
    build(replace(config, fim_rate=0.0), tmp_path / "data", quiet)
    stored = json.loads((tmp_path / "data" / "plan.json").read_text())["settings"]
    assert not {"fim_rate", "fim_tokens", "prefix_rate"} & stored.keys()
    tokenizer = read_tokenizer(tmp_path / "data")
    assert "<fim_prefix>" not in [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_rows_train_on_all_of_it_and_show_names_the_marks(config: DataConfig, tmp_path: Path, packing: str) -> None:
    """Documents are longer than rows, so parts of one are in several."""
    config = replace(config, packing=packing)
    corpus = build_corpus(config, tmp_path / "data", quiet)
    batches = Batches(corpus, 4, 16, seed=0)
    sentinels = find_sentinels(corpus.tokenizer, None)
    stream, steps = batches.streams[0], -(-batches.orders[0].rows_per_epoch // 4)
    seen: dict[str, int] = dict.fromkeys(TRAINED_NAMES, 0)
    for step in range(steps + 1):
        for row, trained in zip(*(batches.batch(step)[name] for name in ("targets", "loss_mask")), strict=True):
            for name, token in zip(TRAINED_NAMES, sentinels, strict=True):
                assert (trained[row == token] == 1).all()
                seen[name] += int((row == token).sum())
    filled = corpus.sources[0].manifest.sources[config.paths[0]].fim_documents
    assert all(filled <= count <= filled * 1.1 + 4 for count in seen.values())
    shown = "\n".join(line for step in range(20) for line in show(batches, step))
    assert "<fim_prefix>" in shown
    assert stream.tokens == corpus.tokens("train")


def test_each_source_has_its_own_rate(config: DataConfig, tmp_path: Path) -> None:
    both = replace(
        config,
        paths=(),
        sources=(
            SourceConfig("web", paths=config.paths, fim_rate=0.0),
            SourceConfig("code", paths=config.paths),
        ),
    )
    corpus = build_corpus(both, tmp_path / "data", quiet)
    web, code = (next(iter(one.manifest.sources.values())).fim_documents for one in corpus.sources)
    assert web == 0 < code
    find_sentinels(open_corpus(tmp_path / "data", both).tokenizer, None)


def test_bad_settings(config: DataConfig, tmp_path: Path, bpe: SentencePieceTokenizer) -> None:
    def problems(config: DataConfig) -> dict[str, str]:
        return dict(config.check())

    assert not problems(config)
    assert "between 0 and 1" in problems(replace(config, fim_rate=1.5))["fim_rate"]
    assert "bytes tokenizer" in problems(replace(config, tokenizer=TokenizerConfig("bytes")))["fim_rate"]
    assert "three different" in problems(replace(config, fim_tokens=("a", "b", "a")))["fim_tokens"]
    assert "there is none" in problems(replace(config, tokens="uint16"))["fim_rate"]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(bpe.serialize())
    loaded = replace(config, tokenizer=TokenizerConfig(path=str(path)))
    with pytest.raises(ConfigError, match=r"fim_rate: this sentencepiece tokenizer has no special.*data\.fim_tokens"):
        build(loaded, tmp_path / "data", quiet)


def test_names_of_its_own(
    byte_level: HuggingFaceTokenizer, with_fim: SentencePieceTokenizer, llama3_file: Path
) -> None:
    llama3 = load_tokenizer("llama3", llama3_file)
    names = ("<|special 2|>", "<|special 3|>", "<|special 4|>")
    assert [llama3.piece(i) for i in find_sentinels(llama3, names)] == [*names]
    with pytest.raises(ConfigError, match="did you mean '<fim_middle>'"):
        find_sentinels(with_fim, ("<fim_prefix>", "<fim_suffix>", "<fim_midle>"))
    with pytest.raises(ConfigError, match="begins or ends a document"):
        find_sentinels(with_fim, ("<fim_prefix>", "<fim_suffix>", "</s>"))
    with pytest.raises(ConfigError, match="'    ' is no special token"):  # an addition that text becomes
        find_sentinels(byte_level, ("    ", "a", "b"))
    with pytest.raises(ConfigError, match="no special tokens known"):
        find_sentinels(BytesTokenizer(), None)
