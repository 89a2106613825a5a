"""tokenizer.json, GPT-2's files and Llama 3's ranks give the ids that their own programs give."""

import base64
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import tokenizers as hf

from lm.data.tokenizers import HuggingFaceTokenizer, Llama3Tokenizer, load_tokenizer


def ranks_file(words: Sequence[bytes]) -> bytes:
    """All bytes, then the words, in the format of Llama 3."""
    ranked = [*(bytes([i]) for i in range(256)), *words]
    return b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(ranked))


def merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """What ranks mean: of all neighbours that are a token, those of the lowest rank become one, from the left."""
    if word in ranks:
        return [ranks[word]]
    parts = [bytes([byte]) for byte in word]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_ranks_in_any_order_are_merged_by_rank() -> None:
    draw = random.Random(0)
    for _ in range(60):
        words = list({bytes(draw.choices(b"ab", k=draw.randrange(2, 9))) for _ in range(draw.randrange(5, 80))})
        draw.shuffle(words)
        tokenizer = Llama3Tokenizer(ranks_file(words))
        ranks = {bytes([i]): i for i in range(256)} | {word: 256 + i for i, word in enumerate(words)}
        texts = ["".join(draw.choices("ab", k=draw.randrange(1, 60))) for _ in range(60)]
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.tolist() == merged(text.encode(), ranks)


def test_llama3_splits_text_as_llama3_does() -> None:
    pieces = ["I", "'M", "x", " ", "123", "45", " ", " x", ";\n\n", "  ", " y", "'ſ", "\tÄb", " 日本", "。\r\n"]
    text = "".join(pieces)
    wrong = [text[i:j] for i in range(len(text)) for j in range(i + 2, min(len(text), i + 6) + 1)]
    words = dict.fromkeys(word.encode() for word in pieces + wrong if len(word.encode()) > 1)
    tokenizer = Llama3Tokenizer(ranks_file(list(words)))
    assert [tokenizer.piece(i) for i in tokenizer.encode(text)] == pieces


def test_llama3_has_its_special_tokens_after_the_ranks(llama3_file: Path) -> None:
    tokenizer = load_tokenizer("llama3", llama3_file)
    ranks = len(llama3_file.read_bytes().splitlines())
    assert tokenizer.vocab_size == ranks + 256
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ranks, ranks + 1)
    assert tokenizer.piece(ranks) == "<|begin_of_text|>"


def test_gpt2_gives_the_ids_of_the_library(gpt2_folder: Path, library_model: hf.Tokenizer, code: list[str]) -> None:
    tokenizer = load_tokenizer("gpt2", gpt2_folder)
    assert tokenizer.bos_id == tokenizer.eos_id == library_model.token_to_id("<|endoftext|>")
    assert tokenizer.piece(tokenizer.eos_id) == "<|endoftext|>"
    draw = random.Random(0)
    texts = [
        *code,
        "I'm, we'LL  see\n\n 123456 x²",
        *("".join(draw.choices("retun _(\n):1é'sd", k=99)) for _ in range(99)),
    ]
    for text in texts:
        assert tokenizer.encode(text).tolist() == library_model.encode(text).ids


def test_gpt2_files_of_either_name_and_layout_are_one_tokenizer(gpt2_folder: Path, tmp_path: Path) -> None:
    vocab = json.loads((gpt2_folder / "vocab.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps(dict(reversed(vocab.items())), indent=1))
    lines = (gpt2_folder / "merges.txt").read_bytes().splitlines()
    (tmp_path / "vocab.bpe").write_bytes(b"\r\n".join(lines))
    first, second = load_tokenizer("gpt2", gpt2_folder), load_tokenizer("gpt2", str(tmp_path))
    assert first.fingerprint == second.fingerprint
    (tmp_path / "vocab.bpe").write_bytes(b"\n".join(lines[:-1]))
    assert load_tokenizer("gpt2", tmp_path).fingerprint != first.fingerprint
    (tmp_path / "vocab.bpe").write_bytes(b"\n".join(lines[1:]))  # without the line that says the version
    assert load_tokenizer("gpt2", tmp_path).fingerprint == first.fingerprint


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
