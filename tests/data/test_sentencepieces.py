from pathlib import Path

import pytest
import sentencepiece

from lm.data.tokenizers import BytesTokenizer, SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from lm.errors import DataError


def test_training_is_deterministic_and_fingerprints_differ(code: list[str], bpe: SentencePieceTokenizer) -> None:
    again = train_sentencepiece(code, model_type="bpe", vocab_size=400)
    other = train_sentencepiece(code, model_type="bpe", vocab_size=360)
    assert again.fingerprint == bpe.fingerprint
    assert len({bpe.fingerprint, other.fingerprint, BytesTokenizer().fingerprint}) == 3


def test_learns_pieces_across_newlines(bpe: SentencePieceTokenizer) -> None:
    pieces = [bpe.piece(i) for i in range(bpe.vocab_size)]
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    assert "\t" in pieces


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


def test_vocabulary_too_large_or_too_small(code: list[str]) -> None:
    largest = train_sentencepiece(["hello world"], model_type="bpe", vocab_size=50_000)
    assert 256 < largest.vocab_size < 400
    assert largest.decode(largest.encode("hello\nworld")) == "hello\nworld"
    with pytest.raises(DataError, match=r"vocab_size 100 is too small.*choose \d+ or more"):
        train_sentencepiece(code, model_type="bpe", vocab_size=100)
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece(["", "\t"], model_type="bpe", vocab_size=1000)


def test_published_models_keep_their_own_rules(code: list[str], tmp_path: Path) -> None:
    """A model that puts a space before the text, like Llama's: same ids as the library, same text back."""
    prefix = str(tmp_path / "m")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in code for line in text.split("\n") if line]),
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
