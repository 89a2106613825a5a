import gzip
import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lm.data.sources import STDLIB, content_hash, cut, documents, jsonl, list_files, whole
from lm.errors import DataError


def texts(path: Path, field: str = "text", skipped: Counter[str] | None = None) -> list[str]:
    counter = Counter() if skipped is None else skipped
    files = list_files([str(path)])
    return [d.text for file in files for d in documents(whole(file), field, counter)]


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_lists_files_in_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.py", ".hidden", ".git/config", "a/.x/y.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    folder = [str(tmp_path / n) for n in ("a/b/c.py", "a/z.txt", "b.txt")]
    assert [f.name for f in list_files([str(tmp_path)])] == folder
    assert [f.name for f in list_files([f"{tmp_path}/**/*.txt"])] == folder[1:]
    assert [f.name for f in list_files([folder[2], str(tmp_path), folder[0]])] == folder
    split = list_files([str(tmp_path)], holdout_paths=[folder[0]])
    assert [f.name for f in split if f.heldout] == folder[:1]
    assert [f.name for f in split if not f.heldout] == folder[1:]


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        list_files([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="no files there"):
        list_files([str(tmp_path)])
    with pytest.raises(DataError, match=r"\*\.txt: no files there"):
        list_files([f"{tmp_path}/*.txt"])


def test_links_to_nowhere_and_pipes_are_errors(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"link\.txt: cannot be read: No such file"):
        list_files([str(tmp_path)])
    (tmp_path / "link.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match=r"pipe\.txt: not a regular file"):
        list_files([str(tmp_path)])


def test_bucket_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://bucket/text: .*gcsfs"):
        list_files(["gs://bucket/text"])


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\n\0 ".encode())
    (tmp_path / "b.txt").write_bytes(b"")
    skipped: Counter[str] = Counter()
    assert texts(tmp_path, skipped=skipped) == ["\ufeffé\r\n\0 "]
    assert skipped == {"empty": 1}


def test_not_utf8_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8: byte 0xef at offset 2; convert"):
        texts(tmp_path)
    (tmp_path / "latin.txt").unlink()
    (tmp_path / "x.jsonl").write_bytes(lines({"text": "ok"}) + b'{"text": "na\xefve"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: not UTF-8: byte 0xef"):
        texts(tmp_path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    rows = [{"body": f"text {i}\n\u2028"} for i in range(5)]
    # Two compressed streams in one file, a blank line, an empty text, no newline at the end.
    first = compress(lines(*rows[:3]) + b"\n")
    second = compress(lines({"body": ""}, *rows[3:])[:-1])
    (tmp_path / f"x.jsonl{suffix}").write_bytes(first + second)
    skipped: Counter[str] = Counter()
    assert texts(tmp_path, "body", skipped) == [row["body"] for row in rows]
    assert skipped == {"empty": 1}


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_truncated_and_broken_compression(tmp_path: Path, suffix: str, compress) -> None:
    content = compress(lines(*({"text": str(i) * i} for i in range(300))))
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(content[: len(content) - 3])
    with pytest.raises(DataError, match=r"x\.jsonl.*truncated"):
        texts(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"x\.jsonl.*truncated"):
        texts(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.jsonl.*truncated"):
        texts(path)
    path.write_bytes(compress(b""))
    assert texts(path) == []
    path.write_bytes(b"no archive at all")
    with pytest.raises(DataError, match="broken compressed data"):
        texts(path)
    text = tmp_path / f"t.txt{suffix}"
    text.write_bytes(compress(b"one document"))
    assert texts(text) == ["one document"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"text": "unfinished', "not JSON: Unterminated string"),
        (b'["text"]', "expected a JSON object, got a list"),
        (b'{"title": "a", "body": "b"}', "no field 'text'; set data.text_field to one of: title, body"),
        (b'{"text": 5}', "field 'text' holds a int, not a text"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, row: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(lines({"text": "a"}, {"text": "b"}) + row + b"\n")
    with pytest.raises(DataError, match=r"x\.jsonl:3: " + message):
        texts(tmp_path)


def test_lone_surrogates_and_nuls_in_json(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00\\u0000\x7f"}\n{"text": "\\udc00"}\n')
    assert texts(tmp_path) == ["a\ufffdb 😀\0\x7f", "\ufffd"]


def test_sources_without_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"")
    (tmp_path / "y.jsonl").write_bytes(b'\n{"text": ""}\n \n')
    (tmp_path / "z.txt").write_bytes(b"")
    skipped: Counter[str] = Counter()
    assert texts(tmp_path, skipped=skipped) == []
    assert skipped == {"empty": 2}


def test_ranges_of_json_lines_hold_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"text": "é" * (i * 7 % 50) + str(i)} for i in range(200)]
    path.write_bytes(lines(*rows) + b"{broken}\n")
    (file,) = list_files([str(path)])
    pieces = cut(file, limit=1000)
    assert len(pieces) > 5
    assert (pieces[0].start, pieces[-1].stop) == (0, file.size)
    assert len({content_hash(piece) for piece in pieces}) == len(pieces)
    with pytest.raises(DataError, match=r"x\.jsonl:201: not JSON"):
        list(documents(pieces[-1], "text", Counter()))
    path.write_bytes(lines(*rows))
    (file,) = list_files([str(path)])
    joined = [d.text for piece in cut(file, 333) for d in documents(piece, "text", Counter())]
    assert joined == [row["text"] for row in rows]
    assert len(cut(file, 10**6)) == 1


@pytest.mark.parametrize("after", [[], [{"text": "c"}]])
def test_a_line_longer_than_many_pieces_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: list[object]
) -> None:
    path, read = tmp_path / "x.jsonl", [0]
    path.write_bytes(lines({"text": "b" * 2_000_000}, *after))

    class Counted(io.FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            count = super().readinto(buffer)
            read[0] += count or 0
            return count

    monkeypatch.setattr(jsonl, "opened", lambda path, size, block: io.BufferedReader(Counted(path), block))
    (file,) = list_files([str(path)])
    pieces = cut(file, limit=1000)
    assert [piece.start for piece in pieces] == [0, 2_000_013][: 1 + len(after)]
    assert read[0] < 2 * file.size


def test_standard_library_is_there_without_this_machines_paths() -> None:
    files = list_files([STDLIB])
    names = [file.name for file in files]
    assert "python-stdlib/json/__init__.py" in names
    assert not any("site-packages" in name or sys.prefix in name for name in names)
    skipped: Counter[str] = Counter()
    some = [f for f in files if f.name.startswith(("python-stdlib/json/", "python-stdlib/test/encoded_modules"))]
    assert any("JSON" in d.text for f in some for d in documents(whole(f), "text", skipped))
