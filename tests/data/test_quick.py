"""tiktoken in place of the tokenizers library: the same ids, or not used."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf

from lm.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from lm.data.tokenizers import byte_level as module
from lm.data.tokenizers.byte_level import LibraryTokenizer, byte_level_bytes
from lm.data.tokenizers.quick import GPT2_PATTERN, LLAMA3_PATTERN, of_json, quick_encoder


def by_library(tokenizer: LibraryTokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer._model.encode_batch(texts, add_special_tokens=False)]


@pytest.fixture(params=["gpt2", "llama3", "huggingface"])
def quick(
    request: pytest.FixtureRequest,
    gpt2_folder: Path,
    llama3_file: Path,
    library_model: hf.Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> LibraryTokenizer:
    monkeypatch.setattr(module, "QUICK_FROM", 1)
    if request.param == "huggingface":
        found: Any = HuggingFaceTokenizer(library_model.to_str().encode())
    else:
        found = load_tokenizer(request.param, gpt2_folder if request.param == "gpt2" else llama3_file)
    found.encode("a")
    assert found._quick is not None
    return found


def same(tokenizer: LibraryTokenizer, texts: list[str]) -> None:
    for text, ours, theirs in zip(texts, tokenizer.encode_batch(texts), by_library(tokenizer, texts), strict=True):
        assert ours.dtype == np.int32
        assert ours.tolist() == theirs, text[:100]


@pytest.mark.parametrize("quick", ["gpt2", "llama3"], indirect=True)
def test_every_character_among_others(quick: LibraryTokenizer) -> None:
    points = [chr(i) for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000]
    texts = ["".join(f"a{c} {c}1" for c in points[i : i + 4000]) for i in range(0, len(points), 4000)]
    same(quick, texts)


def test_random_and_odd_texts(quick: LibraryTokenizer, code: list[str]) -> None:
    draw = np.random.default_rng(0)
    pieces = [
        *"abcdefort '.\n\r\t0123456789é中😀\u00a0\u2028\u0301_",
        "  ",
        "def ",
        "return",
        "'S",
        "<|endoftext|>",
        "\x00",
    ]
    random = ["".join(draw.choice(pieces, int(draw.integers(0, 60)))) for _ in range(5000)]
    runs = [c * n for c in "a 1\n.é中" for n in (1, 2, 3, 99, 100, 101, 30_000)]
    same(quick, [*random, *runs, *(run + "b" for run in runs), *code, "", "lone \ufffd"])
    assert quick.encode("lone \ud800").tolist() == quick.encode("lone \ufffd").tolist()


def test_made_only_when_there_is_much_to_encode(gpt2_folder: Path) -> None:
    tokenizer: Any = load_tokenizer("gpt2", gpt2_folder)
    tokenizer.encode("short")
    assert tokenizer._quick is None
    tokenizer.encode_batch(["word " * 1000] * 300)
    assert tokenizer._quick is not None


VOCAB = {c: i for i, c in enumerate("abcd")}


@pytest.mark.parametrize(
    ("words", "merges", "fits"),
    [
        (["ab", "bc", "abc"], [("a", "b"), ("b", "c"), ("ab", "c")], True),
        # "abc" is merged from "ab", but on its own becomes "a" and "bc": tiktoken would join these.
        (["bc", "ab", "abc"], [("b", "c"), ("a", "b"), ("ab", "c")], False),
        (["ab", "cd"], [("a", "b")], False),  # no merge makes "cd"
        (["ab", "abc"], [("a", "b"), ("ab", "c"), ("a", "b")], False),
    ],
)
def test_only_where_each_token_is_what_its_bytes_become(
    words: list[str], merges: list[tuple[str, str]], fits: bool
) -> None:
    vocab = VOCAB | {word: len(VOCAB) + i for i, word in enumerate(words)}
    made = quick_encoder(vocab, merges, GPT2_PATTERN, str.encode)
    assert (made is not None) == fits
    if made is not None:
        assert made("abcab").tolist() == [vocab["abc"], vocab["ab"]]
    assert quick_encoder(vocab, merges, r"\w+", str.encode) is None


def test_ids_in_any_order() -> None:
    vocab = {"a": 3, "b": 0, "c": 4, "ab": 1, "abc": 2}
    made = quick_encoder(vocab, [("a", "b"), ("ab", "c")], LLAMA3_PATTERN, str.encode)
    assert made is not None
    assert made("abcabc").tolist() == [2, 2]
    assert made("acb").tolist() == [3, 4, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": None},
        {"model": {"dropout": 0.1}},
        {"model": {"byte_fallback": True}},
        {"added_tokens": [{"content": "def", "special": False}]},
    ],
)
def test_files_that_do_more_are_left_to_the_library(library_model: hf.Tokenizer, change: dict[str, Any]) -> None:
    stored = json.loads(library_model.to_str())

    def encoder(content: dict[str, Any]) -> object:
        return of_json(json.dumps(content), lambda word: byte_level_bytes(word, ""))

    assert encoder(stored) is not None
    if "model" in change:
        change = {"model": stored["model"] | change["model"]}
    assert encoder(stored | change) is None
