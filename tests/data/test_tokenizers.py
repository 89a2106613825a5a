import random
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from lm.data.tokenizers import (
    BytesTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    chunks,
    load_tokenizer,
    train_sentencepiece,
)
from lm.errors import DataError

TEXT = [f"def function_{i}(argument, other):\n    if argument > {i}:\n        return other[{i}]\n\n" for i in range(50)]

NASTY = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\n",
    "\ttabs\t\tand\r\nreturns\r",
    "runs      of        spaces\n        indented",
    "\u2581 is what \u2581\u2581 sentencepiece writes for a space\u2581",
    "\u2585 unknown \u2585",
    "NUL \0 inside \0\0",
    "<s></s><unk><0x0A><|endoftext|>",
    "\ufeffbyte order mark",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 and combining é ñ",
    "ﬁ ligature, ① circled, Ⅳ roman, ½, fullwidth ＡＢＣ",
    "日本語 中文 한국어 العربية עברית हिन्दी ไทย Ελληνικά",
    "\x01\x1f\x7f\x80\x85\u2028\u2029\u200b\u200e\uffff\U0010ffff",
    "a" * 5000 + " " * 5000 + "é" * 5000,
]


def random_texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    alphabets = ["ab \n", " \t\n\u2581", "".join(map(chr, range(0x250))), "日本😀\0\u2585x "]
    wide = "".join(chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(64))
    return ["".join(draw.choices(draw.choice([*alphabets, wide]), k=draw.randrange(200))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(TEXT, model_type="bpe", vocab_size=400)


@pytest.fixture(scope="module")
def byte_level() -> HuggingFaceTokenizer:
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXT, trainer)
    model.add_tokens(["    "])
    return HuggingFaceTokenizer(model.to_str().encode())


@pytest.fixture(params=["bytes", "trained", "byte_level"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return BytesTokenizer() if request.param == "bytes" else request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_round_trip_of_nasty_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


def test_round_trip_of_random_text(tokenizer: Tokenizer) -> None:
    texts = random_texts(seed=1, count=300)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert ids.tolist() == tokenizer.encode(text).tolist()


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"


def test_stream_yields_whole_characters_only(tokenizer: Tokenizer) -> None:
    text = "né 😀 日本"
    parts = list(tokenizer.decode_stream(tokenizer.encode(text)))
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    emoji = BytesTokenizer().encode("😀")
    assert list(BytesTokenizer().decode_stream(emoji)) == ["", "", "", "😀", ""]
    assert list(BytesTokenizer().decode_stream(emoji[:2])) == ["", "", "\ufffd"]


def test_ids_that_are_no_text_decode_without_error(tokenizer: Tokenizer) -> None:
    everything = list(range(tokenizer.vocab_size))
    random.Random(0).shuffle(everything)
    tokenizer.decode(everything).encode()
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id]) == ""
    assert tokenizer.token_bytes[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    assert all(tokenizer.piece(i) for i in everything)


def test_serialised_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / tokenizer.file_name
    path.write_bytes(tokenizer.serialize())
    for source in (tokenizer.serialize(), path):
        again = load_tokenizer(tokenizer.kind, source)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(TEXT[0]).tolist() == tokenizer.encode(TEXT[0]).tolist()
        assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_training_is_deterministic_and_fingerprints_differ(trained: SentencePieceTokenizer) -> None:
    again = train_sentencepiece(TEXT, model_type="bpe", vocab_size=400)
    other = train_sentencepiece(TEXT, model_type="bpe", vocab_size=360)
    assert again.fingerprint == trained.fingerprint
    assert len({trained.fingerprint, other.fingerprint, BytesTokenizer().fingerprint}) == 3


def test_learns_pieces_across_newlines(trained: SentencePieceTokenizer) -> None:
    pieces = [trained.piece(i) for i in range(trained.vocab_size)]
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    assert "\t" in pieces


def test_unigram_round_trip() -> None:
    unigram = train_sentencepiece(TEXT, model_type="unigram", vocab_size=320)
    for text in NASTY:
        assert unigram.decode(unigram.encode(text)) == text


def test_characters() -> None:
    alphabet = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert len(alphabet) == 65
    tokenizer = train_sentencepiece([alphabet * 2], model_type="char", vocab_size=8192)
    assert tokenizer.vocab_size == 65 + 3
    for text in (alphabet, "A  B\n\n  C", " "):
        assert len(tokenizer.encode(text)) == len(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("aéb")) == 3
    with_tab = train_sentencepiece(["a\tb"], model_type="char", vocab_size=10)
    assert with_tab.decode(with_tab.encode("\tab\t")) == "\tab\t"


def test_vocabulary_too_large_or_too_small() -> None:
    largest = train_sentencepiece(["hello world"], model_type="bpe", vocab_size=50_000)
    assert 256 < largest.vocab_size < 400
    assert largest.decode(largest.encode("hello\nworld")) == "hello\nworld"
    with pytest.raises(DataError, match=r"vocab_size 100 is too small.*choose \d+ or more"):
        train_sentencepiece(TEXT, model_type="bpe", vocab_size=100)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", "\t"], model_type="bpe", vocab_size=1000)


def test_published_models_keep_their_own_rules(tmp_path: Path) -> None:
    """A model that puts a space before the text, like Llama's: same ids as the library, same text back."""
    prefix = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXT for line in text.split("\n") if line]),
        model_prefix=prefix,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    tokenizer = load_tokenizer("sentencepiece", prefix + ".model")
    text = "return other, or " * 400
    assert tokenizer.encode(text).tolist() == library.encode(text)
    assert tokenizer.decode(tokenizer.encode("return other")) == "return other"


def test_text_that_spells_a_special_token_stays_text(byte_level: HuggingFaceTokenizer) -> None:
    ids = byte_level.encode("a<|endoftext|>b")
    assert byte_level.eos_id not in ids
    assert byte_level.decode(ids) == "a<|endoftext|>b"
    assert byte_level.bos_id == byte_level.eos_id
    assert byte_level.piece(byte_level.eos_id) == "<|endoftext|>"


def test_hugging_face_with_byte_fallback() -> None:
    pieces = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "\u2581a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = hf.Tokenizer(hf.models.BPE(vocab, [("\u2581", "a")], byte_fallback=True))
    model.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("\u2581"), hf.normalizers.Replace(" ", "\u2581")]
    )
    model.decoder = hf.decoders.Sequence([hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback()])
    model.add_special_tokens(["<s>", "</s>"])
    tokenizer = HuggingFaceTokenizer(model.to_str().encode())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.decode(tokenizer.encode("ab a 😀")) == "ab a 😀"


def test_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'lm\[huggingface\]'"):
        load_tokenizer("huggingface", b"{}")


def test_bad_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.model"
    bad.write_bytes(b"not a model")
    for kind in ("sentencepiece", "huggingface"):
        with pytest.raises(DataError, match=r"bad\.model: not a"):
            load_tokenizer(kind, bad)
    with pytest.raises(DataError, match=r"missing\.model: cannot read"):
        load_tokenizer("sentencepiece", tmp_path / "missing.model")
    with pytest.raises(DataError, match="unknown kind"):
        load_tokenizer("morse", b"")
    words = hf.Tokenizer(hf.models.WordLevel({"a": 0, "<s>": 1}, "a"))
    with pytest.raises(DataError, match="only byte-level"):
        load_tokenizer("huggingface", words.to_str().encode())


def test_chunks_prefer_newlines_and_lose_nothing() -> None:
    assert list(chunks("ab\ncd\nefghij", 5)) == ["ab\n", "cd\n", "efghi", "j"]
    for text in random_texts(seed=2, count=50):
        assert "".join(chunks(text, 7)) == text
