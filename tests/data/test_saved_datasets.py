import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lm.data import plan
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.sources import content_hash, cut, documents, list_files, whole
from lm.errors import DataError

ROWS = [{"text": f"é{i}\0 " * (i % 30), "n": i} for i in range(900)]
TEXTS = [row["text"] for row in ROWS if row["text"]]
FILES = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]


def write(path: Path, rows: list[dict], batch: int = 30) -> None:
    schema = pa.schema({"text": pa.string(), "n": pa.int64()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema), max_chunksize=batch)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder as `datasets.DatasetDict.save_to_disk` writes it, with what its cache may leave there."""
    for split, rows in (("train", ROWS), ("test", [{"text": "held out", "n": 0}])):
        folder = tmp_path / "saved" / split
        folder.mkdir(parents=True)
        write(folder / FILES[0], rows[: len(rows) // 2])
        write(folder / FILES[1], rows[len(rows) // 2 :])
        write(folder / "cache-0123.arrow", [{"text": "of another", "n": 0}])
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in FILES]}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return tmp_path / "saved"


def read(path: Path, limit: int | None = None) -> list[str]:
    files = list_files([str(path)])
    pieces = [piece for file in files for piece in (cut(file, limit) if limit else [whole(file)])]
    return [d.text for piece in pieces for d in documents(piece, "text", Counter())]


def test_only_the_files_of_the_dataset_are_read(saved: Path) -> None:
    assert [file.name for file in list_files([str(saved / "train")])] == [str(saved / "train" / n) for n in FILES]
    assert len(list_files([str(saved)])) == 4
    assert read(saved / "train") == TEXTS
    assert read(saved) == ["held out", *TEXTS]


def test_pieces_hold_each_row_once(saved: Path) -> None:
    path = saved / "train" / FILES[1]
    (file,) = list_files([str(path)])
    pieces = cut(file, 5000)
    assert len(pieces) > 4
    assert len({content_hash(piece) for piece in pieces}) == len(pieces)
    assert read(path, 5000) == read(path, 1) == [row["text"] for row in ROWS[450:] if row["text"]]
    names = [d.name for piece in pieces for d in documents(piece, "text", Counter())]
    assert names[0] == f"{path}: row 1"  # the text of row 0 is empty
    assert len(set(names)) == len(names)


def test_broken_files(saved: Path) -> None:
    path = saved / "train" / FILES[0]
    content = path.read_bytes()
    whole_batches = cut(list_files([str(path)])[0], 5000)[-1].start
    offsets = np.cumsum([0] + [len(row["text"].encode()) for row in ROWS[:10]]).astype("<i4").tobytes()
    assert offsets in content
    for broken, message in [
        (content[:-8], "has no end; the file seems truncated"),
        (content[:whole_batches], "has no end; the file seems truncated"),
        (content[:-100], "broken Arrow stream, or none"),
        (content.replace(offsets, offsets[:4] + b"\xff\xff\xff\x7f" + offsets[8:]), "row [01]: "),
        (content[:600], "broken Arrow stream, or none"),
        (b"", "broken Arrow stream, or none"),
        (b"some text, not rows", "broken Arrow stream, or none"),
    ]:
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"{FILES[0]}: .*{message}"):
            read(path)


def test_folders_that_are_not_whole(saved: Path) -> None:
    (saved / "train" / FILES[1]).unlink()
    with pytest.raises(DataError, match=rf"{FILES[1]}: cannot be read"):
        list_files([str(saved)])
    outside = ('{"_data_files": [{"filename": "../test/a.arrow"}]}', '{"_data_files": [{"filename": 5}]}')
    for state in ("{", "{}", '{"_data_files": ["a"]}', *outside):
        (saved / "train" / "state.json").write_text(state)
        with pytest.raises(DataError, match=r"train/state\.json: not of a saved dataset"):
            list_files([str(saved)])


def test_build(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 10_000)
    train, test = str(saved / "train"), str(saved / "test")
    config = DataConfig((train,), holdout_paths=(test,), tokenizer=TokenizerConfig("bytes"), workers=1)
    built = build(config, tmp_path / "data", print)
    assert len(built.splits["train"]) > 2
    assert {name: source.documents for name, source in built.sources.items()} == {train: len(TEXTS), test: 1}
