import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from lm.data import plan
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.sources import content_hash, cut, documents, list_files, whole
from lm.errors import DataError

TEXTS = [f"é{i}\0 " * (i % 30) for i in range(600)]


def write(path: Path, records: list[bytes], group: int = 1) -> None:
    writer = ArrayRecordWriter(str(path), f"group_size:{group}")
    for record in records:
        writer.write(record)
    writer.close()


def read(path: Path, limit: int | None = None, field: str = "text", skipped: Counter[str] | None = None) -> list[str]:
    counter = Counter() if skipped is None else skipped
    (file,) = list_files([str(path)])
    pieces = cut(file, limit) if limit else [whole(file)]
    return [d.text for piece in pieces for d in documents(piece, field, counter)]


@pytest.mark.parametrize("name", ["x.array_record", "x.arrayrecord", "x.array_record-00000-of-00002"])
def test_records_are_texts_or_json_objects(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, ["é\0".encode(), b"", json.dumps({"body": "{1}"}).encode(), b'{"body": "a\\ud800"}'])
    skipped: Counter[str] = Counter()
    assert read(tmp_path / name, field="body", skipped=skipped) == ["é\0", "{1}", "a\ufffd"]
    assert skipped == {"empty": 1}


@pytest.mark.parametrize("group", [1, 50])
def test_pieces_hold_each_record_once(tmp_path: Path, group: int) -> None:
    path = tmp_path / "x.array_record"
    write(path, [text.encode() for text in TEXTS], group)
    wanted = [text for text in TEXTS if text]
    assert read(path) == read(path, 7000) == read(path, 130) == wanted
    (file,) = list_files([str(path)])
    pieces = cut(file, 7000)
    assert len({content_hash(piece) for piece in pieces}) == len(pieces) > 5
    digest = hashlib.sha256()
    assert list(documents(pieces[1], "text", Counter(), digest))
    assert digest.hexdigest() == content_hash(pieces[1])


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "x.array_record"
    for record, message in [
        (b"na\xefve", "not UTF-8: byte 0xef at offset 2"),
        (b"{1", "not JSON: "),
        (b'{"body": "a", "n": 1}', "no field 'text'; set data.text_field to one of: body, n"),
        (b'{"text": 5}', "field 'text' holds a int, not a text"),
    ]:
        write(path, [b"good", record])
        with pytest.raises(DataError, match=rf"x\.array_record: record 1: {message}"):
            read(path)


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "x.array_record"
    write(path, [text.encode() for text in TEXTS])
    content = path.read_bytes()
    middle = len(content) // 3
    damaged = content[:middle] + bytes(b ^ 255 for b in content[middle : middle + 50]) + content[middle + 50 :]
    for broken in (content[:-3], content[:middle], b"", b"text", damaged):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"x\.array_record: broken ArrayRecord file"):
            read(path)


def test_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 10_000)
    path = tmp_path / "x.array_record"
    write(path, [f"{i} {text}".encode() for i, text in enumerate(TEXTS)])
    config = DataConfig((str(path),), tokenizer=TokenizerConfig("bytes"), holdout_fraction=0.1, workers=1)
    built = build(config, tmp_path / "data", print)
    assert len(built.splits["train"]) > 2
    assert built.sources[str(path)].documents == len(TEXTS)
    write(path, [])
    with pytest.raises(DataError, match="no document with text"):
        build(config, tmp_path / "empty", print)
