"""Everything that is done with local paths also works with a bucket, here a folder behind fsspec."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

from lm.data.batches import Batches
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.sources import list_files
from lm.errors import DataError


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
    with pytest.raises(DataError, match=r"\*\* is not for buckets"):
        list_files(["gs://bucket/**/*.txt"])
    config = DataConfig(("gs://bucket/text",), tokenizer=TokenizerConfig(kind="bytes"), workers=1)
    remote = build(config, "gs://bucket/data", print)
    local = build(config, tmp_path / "local", print)
    assert remote.fingerprint == local.fingerprint
    assert build(config, "gs://bucket/data", print) == remote
    ours = Batches("gs://bucket/data", "train", 2, 16, seed=0).batch(5)
    theirs = Batches(tmp_path / "local", "train", 2, 16, seed=0).batch(5)
    assert all((ours[name] == theirs[name]).all() for name in ours)
    assert not list(tmp_path.glob("*.tmp"))
