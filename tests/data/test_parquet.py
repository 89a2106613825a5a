import hashlib
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.data import plan
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.sources import columns, content_hash, cut, documents, list_files, parquet, whole
from lm.errors import DataError

ROWS = [{"text": f"é{i}\0" * (i % 40), "n": i} for i in range(1000)]
TEXTS = [row["text"] for row in ROWS if row["text"]]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=50)
    return path


def read(path: Path, limit: int | None = None, field: str = "text", skipped: Counter[str] | None = None) -> list[str]:
    counter = Counter() if skipped is None else skipped
    (file,) = list_files([str(path)])
    pieces = cut(file, limit) if limit else [whole(file)]
    return [d.text for piece in pieces for d in documents(piece, field, counter)]


def test_rows_are_documents(table: Path) -> None:
    skipped: Counter[str] = Counter()
    assert read(table, skipped=skipped) == TEXTS
    assert skipped == {"empty": 25}


def test_pieces_hold_each_row_once(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_ROWS", 7)
    monkeypatch.setattr(columns, "_ROWS", 3)
    (file,) = list_files([str(table)])
    pieces = cut(file, 2000)
    assert len(pieces) > 4
    assert (pieces[0].start, pieces[-1].stop) == (0, file.size)
    assert len({content_hash(piece) for piece in pieces}) == len(pieces)
    assert read(table, 2000) == read(table, 1) == TEXTS
    names = [d.name for piece in pieces for d in documents(piece, "text", Counter())]
    assert names == [f"{table}: row {row['n']}" for row in ROWS if row["text"]]


def test_digest_is_that_of_the_stored_bytes(table: Path) -> None:
    (file,) = list_files([str(table)])
    for piece in cut(file, 4000):
        digest = hashlib.sha256()
        assert list(documents(piece, "text", Counter(), digest))
        assert (
            digest.hexdigest()
            == content_hash(piece)
            == hashlib.sha256(table.read_bytes()[piece.start : piece.stop]).hexdigest()
        )


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_kinds_of_text_columns(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["a", None, "", "b"]).cast(kind)
    pq.write_table(pa.table({"body": column}), tmp_path / "x.parquet")
    skipped: Counter[str] = Counter()
    assert read(tmp_path / "x.parquet", field="body", skipped=skipped) == ["a", "b"]
    assert skipped == {"empty": 2}


def test_what_cannot_be_read(table: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.parquet: no field 'body'; set data\.text_field to one of: text, n"):
        read(table, field="body")
    with pytest.raises(DataError, match=r"rows\.parquet: row 0: field 'n' holds a int, not a text"):
        read(table, field="n")
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice\.parquet: has 2 columns 'text'"):
        read(tmp_path / "twice.parquet")
    content = table.read_bytes()
    # A byte of the last row group is not enough: it must be one that the decoder looks at.
    for broken in (content[:-3], content[:2000], b"", b"text", content[:60] + bytes(400) + content[460:]):
        table.write_bytes(broken)
        with pytest.raises(DataError, match=r"rows\.parquet: broken Parquet file, or none"):
            read(table)
    buffers = [None, pa.py_buffer(np.array([0, 1, 3], "<i4").tobytes()), pa.py_buffer(b"a\xff\xfe")]
    bad = pa.Array.from_buffers(pa.string(), 2, buffers)
    pq.write_table(pa.table({"text": bad}), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"bad\.parquet: row 1: .*Invalid UTF8"):
        read(tmp_path / "bad.parquet")


def test_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([], pa.schema({"text": pa.string()})), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == read(tmp_path / "x.parquet", 1) == []
    with pytest.raises(DataError, match="no document with text"):
        build(DataConfig((str(tmp_path),), tokenizer=TokenizerConfig("bytes")), tmp_path / "data", print)


def test_without_pyarrow(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"rows\.parquet: reading it needs pyarrow: pip install 'lm\[parquet\]'"):
        read(table)


def test_build_in_parallel_and_continued(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 4000)
    config = DataConfig((str(table),), tokenizer=TokenizerConfig("bytes"), holdout_fraction=0.1, workers=1)
    built = build(config, tmp_path / "one", print)
    assert len(built.splits["train"]) > 2
    assert sum(source.documents for source in built.sources.values()) == len(TEXTS)
    assert build(replace(config, workers=2), tmp_path / "two", print) == built
    for name in ("manifest.json", "part-00001.json"):
        (tmp_path / "two" / name).unlink()
    messages: list[str] = []
    assert build(config, tmp_path / "two", messages.append) == built
    assert "parts are there; going on" in messages[0]
