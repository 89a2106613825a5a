"""Which documents are left out as copies, against an obvious reference, and that nothing else decides it."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm.data import duplicates, files, plan
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.duplicates import bands
from lm.data.manifest import read_manifest
from lm.data.splits import text_hash
from lm.errors import ConfigError, DataError

WORDS = [f"w{i}" for i in range(2000)]
BYTES = TokenizerConfig(kind="bytes")

Documents = Callable[[Path, str], list[str]]
Contents = Callable[[Path], dict[str, str]]


def quiet(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 20_000)


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_corpus(folder: Path) -> list[str]:
    """Three files of documents of which some are copies of others, some nearly so, some of few words or none."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(40, 200))) for _ in range(300)]
    texts += draw.choices(texts, k=60)
    for text in draw.sample(texts[:300], 60):
        words = text.split()
        words[draw.randrange(len(words))] = "changed"
        texts.append(" ".join(words))
    texts += ["one two", "one two", "One, two!", "...", "...", "--", "日本"]
    draw.shuffle(texts)
    folder.mkdir()
    for i in range(3):
        write(folder / f"{i}.jsonl", texts[i::3])
    return [text for i in range(3) for text in texts[i::3]]


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    write_corpus(tmp_path / "corpus")
    return DataConfig((str(tmp_path / "corpus"),), tokenizer=BYTES, holdout_fraction=0.1, workers=1, duplicates="near")


def runs_of(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.lower().replace("日本", "日 本")).split()
    length = min(5, len(words))
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)} if words else set()


def similarity(a: str, b: str) -> float:
    one, two = runs_of(a), runs_of(b)
    return len(one & two) / len(one | two) if one or two else 0.0


def held_out(text: str, below: int) -> bool:
    return text_hash(text.encode()) < below


def test_exact_copies(corpus: DataConfig, tmp_path: Path, documents: Documents) -> None:
    texts = [json.loads(line)["text"] for i in range(3) for line in (tmp_path / "corpus" / f"{i}.jsonl").open()]
    manifest = build(replace(corpus, duplicates="exact"), tmp_path / "data", quiet)
    below = json.loads((tmp_path / "data" / "plan.json").read_text())["holdout_below"]
    first = list(dict.fromkeys(texts))
    assert documents(tmp_path / "data", "train") == [text for text in first if not held_out(text, below)]
    assert documents(tmp_path / "data", "heldout") == [text for text in first if held_out(text, below)]
    (source,) = manifest.sources.values()
    assert source.skipped == {"duplicate": len(texts) - len(first)}
    assert source.documents == len(first)
    assert source.skipped["duplicate"] > 60


def test_near_copies_are_those_that_are_alike(corpus: DataConfig, tmp_path: Path, documents: Documents) -> None:
    texts = [json.loads(line)["text"] for i in range(3) for line in (tmp_path / "corpus" / f"{i}.jsonl").open()]
    manifest = build(corpus, tmp_path / "data", quiet)
    kept = documents(tmp_path / "data", "train") + documents(tmp_path / "data", "heldout")
    assert len(set(kept)) == len(kept)
    has_run: dict[tuple[str, ...], set[str]] = {}
    for text in kept:
        for run in runs_of(text):
            has_run.setdefault(run, set()).add(text)
    for text in texts:
        alike = max(
            (similarity(text, other) for run in runs_of(text) for other in has_run.get(run, set()) - {text}), default=0
        )
        assert alike < 0.9 if text in kept else alike > 0.5
    assert {"...", "--"} <= set(kept)  # nothing to compare
    assert sum(text in kept for text in ("one two", "One, two!")) == 1
    (source,) = manifest.sources.values()
    assert source.skipped["near duplicate"] > 50
    assert len(kept) == len(texts) - sum(source.skipped.values())


def test_neither_workers_nor_memory_change_the_result(
    corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Contents
) -> None:
    build(corpus, tmp_path / "one", quiet)
    build(replace(corpus, workers=2), tmp_path / "two", quiet)
    monkeypatch.setattr(duplicates, "_BUCKET_BYTES", 5_000)
    monkeypatch.setattr(duplicates, "_STRETCH_BYTES", 500)
    monkeypatch.setattr(duplicates, "_SPILL_BYTES", 5_000)
    monkeypatch.setattr(duplicates, "_BATCH_RUNS", 1_000)
    monkeypatch.setattr(duplicates, "_PENDING_PAIRS", 10)
    written: set[str] = set()
    write = files.write_atomically

    def spy(path: Any, content: bytes) -> None:
        written.add(path.name)
        write(path, content)

    monkeypatch.setattr(files, "write_atomically", spy)
    build(corpus, tmp_path / "three", quiet)
    assert sum(name.startswith("joined") for name in written) >= 32
    assert "hashes-00000-001.bin" in written
    monkeypatch.setattr(duplicates, "_BATCH_DOCUMENTS", 2)
    written.clear()
    build(corpus, tmp_path / "four", quiet)
    assert "hashes-00000-001.bin" in written
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")
    assert contents(tmp_path / "three") == contents(tmp_path / "four")
    assert not list((tmp_path / "three").glob("duplicates-*"))


def test_what_is_held_out_comes_first(tmp_path: Path, documents: Documents) -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=100)) for _ in range(200)]
    copies = [text + " more" for text in texts]
    write(tmp_path / "a.jsonl", copies + texts)
    config = DataConfig(
        (str(tmp_path / "a.jsonl"),), tokenizer=BYTES, holdout_fraction=0.2, duplicates="near", workers=1
    )
    build(config, tmp_path / "data", quiet)
    train, heldout = (documents(tmp_path / "data", split) for split in ("train", "heldout"))
    assert len(train) + len(heldout) == 200
    assert not {text.removesuffix(" more") for text in train} & {text.removesuffix(" more") for text in heldout}
    below = json.loads((tmp_path / "data" / "plan.json").read_text())["holdout_below"]
    either = sum(held_out(a, below) or held_out(b, below) for a, b in zip(texts, copies, strict=True))
    assert len(heldout) == either


def test_holdout_paths_stay_as_they_are(tmp_path: Path, documents: Documents) -> None:
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=100)) for _ in range(20)]
    write(tmp_path / "train.jsonl", texts)
    write(tmp_path / "valid.jsonl", [texts[3], texts[3], texts[3] + " more", texts[5] + " more"])
    config = DataConfig(
        (str(tmp_path / "train.jsonl"),),
        holdout_paths=(str(tmp_path / "valid.jsonl"),),
        tokenizer=BYTES,
        duplicates="near",
        workers=1,
    )
    manifest = build(config, tmp_path / "data", quiet)
    assert documents(tmp_path / "data", "heldout") == [texts[3], texts[3], texts[3] + " more", texts[5] + " more"]
    assert documents(tmp_path / "data", "train") == [text for i, text in enumerate(texts) if i not in (3, 5)]
    counts = manifest.sources[str(tmp_path / "train.jsonl")].skipped
    assert counts == {"duplicate": 1, "near duplicate": 1}


def test_how_often_what_is_alike_is_found(tmp_path: Path, documents: Documents) -> None:
    """Of pairs with a similarity near 0.8 about as many as theory says, and few of those near 0.5."""
    draw = random.Random(2)
    texts = {}
    for wanted, changed in ((0.8, 2), (0.5, 7)):
        pairs = []
        for _ in range(150):
            words = draw.sample(WORDS, 100)
            other = list(words)
            for place in draw.sample(range(4, 96, 10), changed):  # each in five runs of its own
                other[place] = "changed"
            pairs += [" ".join(words), " ".join(other)]
        assert abs(similarity(pairs[0], pairs[1]) - wanted) < 0.06
        texts[wanted] = pairs
    found = {}
    for wanted, pairs in texts.items():
        write(tmp_path / f"{wanted}.jsonl", pairs)
        config = DataConfig(
            (str(tmp_path / f"{wanted}.jsonl"),), tokenizer=BYTES, holdout_fraction=0, duplicates="near", workers=1
        )
        build(config, tmp_path / f"data{wanted}", quiet)
        found[wanted] = 300 - len(documents(tmp_path / f"data{wanted}", "train"))
    assert found[0.8] >= 135
    assert found[0.5] <= 10


def test_bands() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        count, rows = bands(threshold)
        assert 1 - (1 - threshold**rows) ** count >= 0.9
        assert count * rows <= 256
    assert bands(0.8) == (25, 10)
    assert bands(1.0) == (1, 256)
    assert bands(0.001) == (256, 1)


KILLED = """
import os, signal, sys
from lm import files as writing
from lm.data import build, files, plan
from lm.data.config import DataConfig, TokenizerConfig

plan.MIN_PART_BYTES = 20_000
replace, publish, sync, calls = writing._replace_local, files.publish, os.fsync, 0
def due():
    return calls == int(sys.argv[3])
def sync_or_die(file):
    if due() and calls % 2:  # in the middle of a file
        os.ftruncate(file, os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    sync(file)
def replace_and_die(target, contents):
    global calls
    calls += 1
    replace(target, contents)
    if due():
        os.kill(os.getpid(), signal.SIGKILL)
def publish_and_die(temporary, path):
    publish(temporary, path)
    if due():
        os.kill(os.getpid(), signal.SIGKILL)
writing._replace_local, files.publish, os.fsync = replace_and_die, publish_and_die, sync_or_die
tokenizer = TokenizerConfig("bytes")
config = DataConfig((sys.argv[1],), holdout_fraction=0.1, workers=1, tokenizer=tokenizer, duplicates="near")
build.build(config, sys.argv[2], print)
print("calls", calls)
"""


def killed(corpus: Path, folder: Path, call: int) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", KILLED, str(corpus), str(folder), str(call)]
    return subprocess.run(arguments, check=False, capture_output=True, text=True)


def test_killed_at_any_point_and_continued(corpus: DataConfig, tmp_path: Path, contents: Contents) -> None:
    """The same directory is killed again and again, a little later each time."""
    folder, source = tmp_path / "killed", tmp_path / "corpus"
    build(corpus, tmp_path / "whole", quiet)
    writes = 3  # plan, tokenizer, prepared: then every pass is met
    for call in (4, 5, 8, 14, 7, 9, 15, 10):
        ended = killed(source, folder, call)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        writes += call
        with pytest.raises(DataError, match="no built data here"):
            read_manifest(folder)
    assert writes > 30
    build(corpus, folder, quiet)
    assert contents(folder) == contents(tmp_path / "whole")


def test_sources_that_change_after_duplicates_were_looked_for(corpus: DataConfig, tmp_path: Path) -> None:
    folder, file = tmp_path / "data", tmp_path / "corpus" / "1.jsonl"
    hashed = 0
    for call in range(4, 40):
        assert killed(tmp_path / "corpus", folder, call).returncode == -signal.SIGKILL
        hashed = len(list(folder.glob("duplicates-*/left-out-*")))
        if hashed:
            break
    assert hashed
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"w1", b"w2"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match=r"1\.jsonl.*changed since duplicates were looked for"):
        build(corpus, folder, quiet)


def test_without_the_library(corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"pip install 'lm\[dedup\]'"):
        build(corpus, tmp_path / "data", quiet)
    build(replace(corpus, duplicates="exact"), tmp_path / "data", quiet)


def test_other_settings_are_refused_and_older_directories_are_not(corpus: DataConfig, tmp_path: Path) -> None:
    kept = replace(corpus, duplicates="keep")
    build(kept, tmp_path / "data", quiet)
    assert "duplicates" not in json.loads((tmp_path / "data" / "plan.json").read_text())["settings"]
    build(kept, tmp_path / "data", quiet)
    with pytest.raises(DataError, match=r"data\.duplicates: built with 'keep', now 'near'"):
        build(corpus, tmp_path / "data", quiet)
