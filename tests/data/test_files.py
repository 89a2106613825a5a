"""Everything that is done with local paths also works with a bucket, here a folder behind fsspec."""

import concurrent.futures
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

from lm.data import plan
from lm.data.batches import Batches
from lm.data.build import build, build_share
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.corpus import open_corpus
from lm.data.shares import Share
from lm.data.sources import list_files


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cloud"
    (root / "bucket").mkdir(parents=True)

    class Bucket(LocalFileSystem):
        protocol = ("gcs", "gs")

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return super()._strip_protocol(os.fspath(path).replace("gs://", f"{root}/"))

    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "gs", Bucket)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return root / "bucket"


def test_build_and_read_in_a_bucket(bucket: Path, tmp_path: Path) -> None:
    (bucket / "text" / "deep").mkdir(parents=True)
    for i in range(4):
        (bucket / "text" / "deep" / f"{i}.txt").write_text(f"document {i} " * 50)
    (bucket / "text" / "rows.jsonl").write_text(json.dumps({"text": "a row"}) + "\n")
    (bucket / "text" / ".hidden").write_text("hidden")
    names = [file.name for file in list_files(["gs://bucket/text"])]
    assert names == [*(f"gs://bucket/text/deep/{i}.txt" for i in range(4)), "gs://bucket/text/rows.jsonl"]
    assert [file.name for file in list_files(["gs://bucket/**/*.txt"])] == names[:4]
    config = DataConfig(("gs://bucket/text",), tokenizer=TokenizerConfig(kind="bytes"), workers=1)
    remote = build(config, "gs://bucket/data", print)
    local = build(config, tmp_path / "local", print)
    assert remote.fingerprint == local.fingerprint
    assert build(config, "gs://bucket/data", print) == remote
    ours = Batches(open_corpus("gs://bucket/data"), 2, 16, seed=0).batch(5)
    theirs = Batches(open_corpus(tmp_path / "local"), 2, 16, seed=0).batch(5)
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert not list(tmp_path.glob("*.tmp"))


def test_passes_over_all_parts_and_shares_in_a_bucket(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 2_000)
    texts = [" ".join(f"w{i * j % 97}" for j in range(40)) for i in range(1, 60)]
    rows = [{"text": text} for text in [*texts, *texts[:7], *(text + " more" for text in texts[7:10])]]
    (bucket / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (bucket / "questions.jsonl").write_text(json.dumps({"question": texts[20]}) + "\n")
    config = DataConfig(
        ("gs://bucket/rows.jsonl",),
        tokenizer=TokenizerConfig(kind="bytes"),
        workers=1,
        duplicates="near",
        overlap_paths=("gs://bucket/questions.jsonl",),
        overlap="remove",
    )
    local = build(config, tmp_path / "local", print)
    assert local.sources["gs://bucket/rows.jsonl"].skipped == {"duplicate": 7, "near duplicate": 3, "overlap": 1}
    shares = [Share(0, 2), Share(1, 2)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = pool.map(lambda share: build_share(config, "gs://bucket/data", print, share=share), shares)
        assert local in list(found)
    assert {path.name for path in (bucket / "data").iterdir()} == {
        path.name for path in (tmp_path / "local").iterdir() if path.suffix != ".lock"
    }
