import random

import pytest

from lm.data.tokenizers import BytesTokenizer
from lm.generate.stops import RowText


def shown(text: str, *stop: str) -> tuple[list[str], bool]:
    """What each byte of `text` lets be seen, then the rest."""
    row = RowText(BytesTokenizer(), [256], stop)
    parts = []
    for byte in text.encode():
        parts.append(row.push(byte))
        if row.stopped:
            break
    return [*parts, row.finish()], row.stopped


def test_text_appears_at_once_without_stop_strings() -> None:
    assert shown("abc") == (["a", "b", "c", ""], False)


def test_a_character_appears_with_its_last_token() -> None:
    assert shown("aé€") == (["a", "", "é", "", "", "€", ""], False)


def test_an_unfinished_character_is_replaced_at_the_end() -> None:
    row = RowText(BytesTokenizer(), [], ())
    assert [row.push(0xE2), row.push(0x82), row.finish()] == ["", "", "\ufffd"]


def test_the_beginning_of_a_stop_string_is_held_until_decided() -> None:
    assert shown("xENDy", "END") == (["x", "", "", "", ""], True)
    assert shown("xENx", "END") == (["x", "", "", "ENx", ""], False)
    assert shown("xEN", "END") == (["x", "", "", "EN"], False)


@pytest.mark.parametrize(
    ("text", "stop", "seen"),
    [
        ("aaab", ("aab",), "a"),  # the beginning repeats inside the stop string
        ("abcd", ("bcd", "c"), "ab"),  # c is complete first
        ("abcd", ("c", "bc"), "a"),  # both at once: the longest
        ("a\n\nb\n\n", ("\n\n",), "a"),
        ("x€y", ("€",), "x"),
        ("STOP", ("STOP",), ""),
    ],
)
def test_what_is_before_the_stop_string(text: str, stop: tuple[str, ...], seen: str) -> None:
    parts, stopped = shown(text, *stop)
    assert "".join(parts) == seen
    assert stopped


def test_random_texts_agree_with_a_search_in_the_whole_text() -> None:
    draw = random.Random(0)
    stopped_count = 0
    for _ in range(500):
        text = "".join(draw.choices("abé", k=12))
        stops = tuple("".join(draw.choices("abé", k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3)))
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        parts, stopped = shown(text, *stops)
        assert "".join(parts) == (text[: min(ends)[1]] if ends else text), (text, stops)
        assert stopped == bool(ends)
        stopped_count += stopped
    assert 50 < stopped_count < 450
