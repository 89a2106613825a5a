import random
import re

import numpy as np
import pytest

from lm.data import words
from lm.data.words import runs, word_hashes


def plain(text: str) -> list[str]:
    """The words of text in ASCII."""
    return re.findall("[a-z0-9]+", text.lower())


def test_words_are_equal_where_case_and_punctuation_differ() -> None:
    text = "The quick, brown fox; THE QUICK -- (brown) fox!"
    found = word_hashes(text).tolist()
    assert found[:4] == found[4:]
    assert len(set(found)) == 4


def test_like_an_obvious_reference() -> None:
    draw = random.Random(0)
    text = (
        "".join(draw.choices("aAbB cdé1. ,\n-日本\0", k=20_000)).replace("é", "e").replace("日", "").replace("本", "")
    )
    number = dict(zip(plain(text), word_hashes(text).tolist(), strict=True))
    assert [number[word] for word in plain(text)] == word_hashes(text).tolist()
    assert len(set(number.values())) == len(number) > 500


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        (" .,\n\0", 0),
        ("don't", 2),
        ("日本語", 3),  # a character each, as there are no spaces
        ("x日y", 3),
        ("नमस्ते दुनिया", 2),  # vowel signs are within words
        ("Straße ΣΊΣΥΦΟΣ", 2),
        ("a\ud800b", 2),
        ("😀 a", 1),
        ("٣٤ x", 2),
    ],
)
def test_what_a_word_is(text: str, count: int) -> None:
    assert len(word_hashes(text)) == count


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{i}" for i in range(3000)) + "\n" + "x" * 5000
    whole = word_hashes(text)
    monkeypatch.setattr(words, "_BLOCK", 1000)
    assert (word_hashes(text)[:3000] == whole[:3000]).all()  # the long word is cut, as it must be somewhere


def test_runs() -> None:
    a, b = word_hashes("a b c d e f"), word_hashes("x b c d e y")
    shared = set(runs(a, 3).tolist()) & set(runs(b, 3).tolist())
    assert shared == set(runs(word_hashes("b c d e"), 3).tolist())
    assert len(shared) == 2
    assert len(runs(a, 7)) == 0
    assert len(runs(np.zeros(0, np.uint64), 13)) == 0
    assert runs(word_hashes("a b"), 2) != runs(word_hashes("b a"), 2)


def test_numbers_stay_what_they_are() -> None:
    """Machines that build together, and builds that go on, count on it."""
    assert runs(word_hashes("Hello, 世界"), 3).tolist() == [NUMBER]


NUMBER = 13687460899048423361
