from lm.generate.generate import Piece
from lm.generate.scores import score_lines, visible

PIECES = [
    Piece(0, "a", 97, "a", 0.75, 1.5, None),
    Piece(0, "\n", 10, "\n", 0.1, 2.25, None),
    Piece(0, "\x1b", 27, "\x1b", 0.034, 3.0, None),
    Piece(0, "", 257, "<eos>", 0.5, 0.0, "eos"),
]


def test_plain_table_and_text_mark_what_is_below_the_threshold() -> None:
    assert list(score_lines(PIECES, 0.1, "plain")) == [
        "probability  entropy (nats)  token",
        "     0.7500           1.500  a",
        "     0.1000           2.250  \\n",
        "     0.0340           3.000  [\\x1b|0.034]",
        "     0.5000           0.000  <eos>",
        "",
        "a",
        "[\\x1b|0.034]<eos>",
        "1 of 4 tokens have a probability below 0.1",
    ]


def test_terminal_marks_are_reverse_video_and_the_model_cannot_send_codes() -> None:
    lines = list(score_lines(PIECES, 0.1, "terminal"))
    assert lines[3].endswith("  \x1b[7m\\x1b\x1b[27m")
    assert sum(line.count("\x1b") for line in lines) == 4


def test_a_probability_that_is_no_number_is_marked() -> None:
    lines = list(score_lines([Piece(0, "x", 1, "x", float("nan"), float("nan"), "length")], 0.1, "plain"))
    assert lines[-2:] == ["[x|nan]", "1 of 1 tokens have a probability below 0.1"]


def test_visible_spares_text() -> None:
    assert visible("é\n\t€\r\x07\x9b") == "é\n\t€\\r\\x07\\x9b"
