"""What a build meets in the world: broken files, monstrous documents, full disks. Each ends as it should."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lm.data import plan
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.manifest import read_manifest
from lm.errors import DataError

Documents = Callable[[Path, str], list[str]]
Contents = Callable[[Path], dict[str, str]]


def quiet(message: str) -> None:
    pass


def configured(*paths: Path, **settings: object) -> DataConfig:
    config = DataConfig(tuple(map(str, paths)), tokenizer=TokenizerConfig(kind="bytes"), workers=1)
    return replace(config, **settings)  # type: ignore[arg-type]


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("duplicates", ["keep", "near"])
def test_broken_sources_end_the_build(tmp_path: Path, duplicates: str) -> None:
    """Whichever pass meets them first."""
    good = tmp_path / "a.jsonl"
    good.write_bytes(lines_of([f"text {i}" for i in range(50)]))

    def refused(name: str, content: bytes, message: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            build(configured(good, path, duplicates=duplicates), tmp_path / f"data-{name}", quiet)

    packed = gzip.compress(lines_of([str(random.Random(i).random()) for i in range(2000)]))
    refused("cut.jsonl.gz", packed[: len(packed) // 2], r"cut\.jsonl\.gz: the compressed data ends too early")
    refused("broken.jsonl", b'{"text": "a"}\n{"text": ', r"broken\.jsonl:2: not JSON")
    refused("latin.txt", b"caf\xe9", r"latin\.txt: not UTF-8: byte 0xe9 at offset 3")
    table = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), table)
    refused("t.parquet", table.read_bytes(), "no field 'text'; set data.text_field to one of: body, id")


def test_empty_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="no document with text"):
        build(configured(tmp_path / "empty.jsonl", duplicates="near"), tmp_path / "data", quiet)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="no files there"):
        build(configured(tmp_path / "folder"), tmp_path / "data", quiet)
    (tmp_path / "a.jsonl").write_bytes(lines_of([f"text {i}" for i in range(50)]))
    built = build(configured(tmp_path / "empty.jsonl", tmp_path / "a.jsonl"), tmp_path / "data", quiet)
    assert built.sources[str(tmp_path / "empty.jsonl")].documents == 0


def test_nuls_and_lone_surrogates(tmp_path: Path, documents: Documents) -> None:
    texts = ["\0" * 40, "a\0b", *(f"\ud800 {i} \udfff and some more words that say nothing" for i in range(20))]
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    config = configured(tmp_path / "a.jsonl", duplicates="near", near_similarity=1.0, holdout_fraction=0.0)
    build(config, tmp_path / "data", quiet)
    expected = [text.replace("\ud800", "\ufffd").replace("\udfff", "\ufffd") for text in texts]
    assert documents(tmp_path / "data", "train") == expected


MEMORY = """
import resource, sys
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenizer = TokenizerConfig("bytes")
config = DataConfig((sys.argv[1],), holdout_fraction=0.0, workers=1, tokenizer=tokenizer, duplicates="near")
manifest = build(config, sys.argv[2], lambda line: None)
print(manifest.tokens("train"), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_document_of_a_hundred_megabytes(tmp_path: Path) -> None:
    size = 100_000_000
    line = " ".join(f"word{i}" for i in range(100_000)) + " "
    text = (line * (size // len(line) + 1))[:size]
    (tmp_path / "a.jsonl").write_bytes(lines_of(["before", text, "after"]))
    arguments = [str(tmp_path / "a.jsonl"), str(tmp_path / "data")]
    ran = subprocess.run([sys.executable, "-c", MEMORY, *arguments], check=True, capture_output=True, text=True)
    tokens, memory = map(int, ran.stdout.split())
    assert tokens == len("before") + size + len("after") + 6
    assert memory < 12 * size + 100_000_000  # for each byte: JSON, text, bytes, ids, the hash of a share of a word


FULL = """
import resource, sys
from lm.cli import main
from lm.data import plan

plan.MIN_PART_BYTES = 20_000
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("room", [100, 2_000, 20_000, 60_000])
def test_a_disk_that_fills(tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch, contents: Contents) -> None:
    """Files end at so many bytes, as they do on a full disk; with more room the same command goes on."""
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 20_000)
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(1000)}" for _ in range(60)) for _ in range(300)]
    texts += texts[:10]
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    config = configured(tmp_path / "a.jsonl", duplicates="near", holdout_fraction=0.1)
    (tmp_path / "config.py").write_text(
        "from lm.data.config import DataConfig, TokenizerConfig\nfrom lm.experiment import Config\n"
        f"config = Config(data={config!r})\n"
    )
    command = ["data", "build", str(tmp_path / "config.py"), f"--data.dir={tmp_path / 'data'}"]
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(room), *command, "--model.vocab_size=258"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 5, ended.stderr
    assert "cannot write " in ended.stderr
    assert "Traceback" not in ended.stderr
    with pytest.raises(DataError, match="no built data here"):
        read_manifest(tmp_path / "data")
    build(config, tmp_path / "data", quiet)
    build(config, tmp_path / "whole", quiet)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_checksums_are_of_the_documents_not_of_how_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {i} " * 50 for i in range(300)]
    (tmp_path / "one.jsonl").write_bytes(lines_of(texts))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.jsonl").write_bytes(lines_of(texts[100:]))
    (tmp_path / "two" / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(texts[:100])))
    (tmp_path / "other.jsonl").write_bytes(lines_of([*texts[:-1], "changed"]))

    def checksum(path: Path, name: str) -> str | None:
        (source,) = build(configured(path), tmp_path / name, quiet).sources.values()
        return source.checksum

    one = checksum(tmp_path / "one.jsonl", "data1")
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 5_000)
    assert checksum(tmp_path / "one.jsonl", "data2") == one == checksum(tmp_path / "two", "data3")
    assert checksum(tmp_path / "other.jsonl", "data4") != one
