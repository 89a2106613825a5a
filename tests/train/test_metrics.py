"""metrics.jsonl as it may be found: long, torn, damaged, with numbers that are not finite, or not at all."""

import json
import math
import random
from pathlib import Path

import pytest

from lm.errors import StorageError
from lm.train import metrics
from lm.train.metrics import Line, latest, read, recent


def written(path: Path, count: int, *, every: int = 100, more: bytes = b"") -> list[Line]:
    """Lines of different lengths; each so many have `rare`."""
    draw, lines = random.Random(0), []
    for step in range(count):
        values = {"loss": draw.random(), **{f"v{n}": draw.random() for n in range(draw.randint(0, 30))}}
        lines.append(Line(step, values | ({"rare": float(step)} if step % every == 0 else {})))
    text = "".join(json.dumps({"step": line.step, **line.values}) + "\n" for line in lines)
    path.write_bytes(text.encode() + more)
    return lines


def test_the_end_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_FIRST_BYTES", 300)
    path = tmp_path / "metrics.jsonl"
    for count in (0, 1, 2, 19, 20, 21, 500):
        lines = written(path, count)
        assert read(path) == (lines, 0)
        for wanted in (1, 20, 1000):
            assert recent(path, wanted) == lines[-wanted:]
        assert latest(path, "rare") == ([line for line in lines if "rare" in line.values] or [None])[-1]
        assert latest(path, "none") is None


def test_a_search_goes_back_only_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_FIRST_BYTES", 300)
    monkeypatch.setattr(metrics, "_SEARCH_BYTES", 10_000)
    written(tmp_path / "metrics.jsonl", 1000, every=1000)
    assert latest(tmp_path / "metrics.jsonl", "rare") is None


@pytest.mark.parametrize("torn", [b'{"step": 5', b'{"step": 5, "loss": 1.0}', b"\xff\xfe", b'{"step": 5, "lo\xc3'])
def test_a_last_line_without_an_end_does_not_count(tmp_path: Path, torn: bytes) -> None:
    lines = written(tmp_path / "metrics.jsonl", 5, more=torn)
    assert read(tmp_path / "metrics.jsonl") == (lines, 0)
    assert recent(tmp_path / "metrics.jsonl") == lines


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    bad = [b"\x00\x00\x00", b'{"loss": 1.0}', b"[1]", b'{"step": "x"}', b'{"step": 7, "loss"', b"\xff", b"null"]
    lines = written(tmp_path / "metrics.jsonl", 5, more=b"".join(one + b"\n" for one in bad) + b'{"step": 9}\n')
    assert read(tmp_path / "metrics.jsonl") == ([*lines, Line(9, {})], len(bad))
    assert recent(tmp_path / "metrics.jsonl", 3) == [*lines[-2:], Line(9, {})]


def test_numbers_that_are_not_finite_and_what_is_no_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": "text", "e": null, "f": [1]}\n')
    [only], _ = read(path)
    assert math.isnan(only.values["a"])
    assert {**only.values, "a": 0} == {"a": 0, "b": math.inf, "c": -math.inf}


def test_no_file_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert read(tmp_path / "none") == ([], 0)
    assert recent(tmp_path / "none") == []
    assert latest(tmp_path / "none", "loss") is None
    with pytest.raises(StorageError, match="cannot read what the run logged"):
        recent(tmp_path)
