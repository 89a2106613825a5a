import concurrent.futures
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from lm.data import files, plan, sources, vocabulary, workers
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.files import sole_writer
from lm.data.manifest import read_manifest, read_tokenizer
from lm.data.stream import TokenStream
from lm.errors import DataError, StorageError

Documents = Callable[[Path, str], list[str]]
Contents = Callable[[Path], dict[str, str]]

BYTES = TokenizerConfig(kind="bytes")


def quiet(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 20_000)


def write_corpus(folder: Path, files: int = 12, seed: int = 0) -> dict[str, str]:
    """Text files and one .jsonl file of several parts; some documents twice. Gives text by name."""
    draw = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "\n", "    ", "é", "日本", "😀", "x = 1\n"]
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for i in range(files):
        texts[f"{i:02}.txt"] = " ".join(draw.choices(words, k=draw.randrange(1, 2000)))
    texts["copy.txt"] = texts["00.txt"]
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    rows = [" ".join(draw.choices(words, k=draw.randrange(1, 60))) for _ in range(400)]
    texts |= {f"rows:{i}": row for i, row in enumerate(rows)}
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return texts


@pytest.fixture
def corpus(tmp_path: Path) -> DataConfig:
    write_corpus(tmp_path / "corpus")
    return DataConfig(paths=(str(tmp_path / "corpus"),), tokenizer=BYTES, holdout_fraction=0.1, workers=1)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_every_document_is_in_one_split(tmp_path: Path, documents: Documents, kind) -> None:
    texts = write_corpus(tmp_path / "corpus")
    tokenizer = TokenizerConfig(kind=kind, vocab_size=400)
    config = DataConfig((str(tmp_path / "corpus"),), tokenizer=tokenizer, holdout_fraction=0.1, workers=1)
    manifest = build(config, tmp_path / "data", quiet)
    train, heldout = (documents(tmp_path / "data", split) for split in ("train", "heldout"))
    assert sorted(train + heldout) == sorted(texts.values())
    assert not set(train) & set(heldout)
    assert 10 < len(heldout) < 100
    assert len(manifest.splits["train"]) > 3
    assert manifest.documents("train") == len(train)
    assert manifest.text_bytes("train") == sum(len(text.encode()) for text in train)
    (source,) = manifest.sources.values()
    assert source.documents == len(texts)
    assert source.heldout_documents == len(heldout)
    assert source.tokens == manifest.tokens("train") + manifest.tokens("heldout")
    TokenStream(tmp_path / "data", "train").verify()


def test_workers_do_not_change_the_result(corpus: DataConfig, tmp_path: Path, contents: Contents) -> None:
    one = build(corpus, tmp_path / "one", quiet)
    two = build(replace(corpus, workers=2), tmp_path / "two", quiet)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one == two == read_manifest(tmp_path / "one")
    assert not list((tmp_path / "two").glob("*.tmp"))


def test_second_run_writes_and_tokenises_nothing(
    corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(corpus, tmp_path / "data", quiet)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()}
    for name in ("documents", "content_hash"):
        monkeypatch.setattr(sources, name, None)  # whoever reads text fails
    assert build(corpus, tmp_path / "data", quiet) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "data").iterdir()} == before


KILLED = """
import os, signal, sys
from lm.data import build, files, plan
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.records import ShardWriter

plan.MIN_PART_BYTES = 20_000
calls = 0
def dying(function, before):
    def call(*args, **kwargs):
        global calls
        calls += 1
        result = None if calls == int(sys.argv[3]) and before else function(*args, **kwargs)
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
if sys.argv[4] == "publish":
    files.publish = dying(files.publish, before=False)
elif sys.argv[4] == "record":
    ShardWriter._flush = dying(ShardWriter._flush, before=False)
else:
    files.write_atomically = dying(files.write_atomically, before=True)
tokenizer = TokenizerConfig(kind="sentencepiece", vocab_size=400)
build.build(DataConfig((sys.argv[1],), holdout_fraction=0.1, workers=1, tokenizer=tokenizer), sys.argv[2], print)
"""


@pytest.mark.parametrize(
    ("call", "what"),
    [(1, "write"), (2, "write"), (4, "write"), (3, "publish"), (8, "publish"), (9, "record")],
)
def test_killed_and_continued_is_bit_identical(tmp_path: Path, contents: Contents, call: int, what: str) -> None:
    write_corpus(tmp_path / "corpus")
    folder = tmp_path / "killed"
    arguments = [str(tmp_path / "corpus"), str(folder), str(call), what]
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    with pytest.raises(DataError, match="no built data here"):
        read_manifest(folder)
    config = DataConfig(
        (str(tmp_path / "corpus"),),
        holdout_fraction=0.1,
        workers=1,
        tokenizer=TokenizerConfig(kind="sentencepiece", vocab_size=400),
    )
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("part-*.json")}
    build(config, folder, quiet)
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    build(config, tmp_path / "whole", quiet)
    assert contents(folder) == contents(tmp_path / "whole")


def test_what_killed_builds_left_goes_before_the_disk_is_needed(corpus: DataConfig, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "data"
    (folder / "duplicates-0").mkdir(parents=True)
    names = [f"{name}.{platform.node()}.{dead.pid}.tmp" for name in ("train-00000.array_record", "duplicates-0/a")]
    used = [f"b.{platform.node()}.{os.getpid()}.tmp", f"c.another.{dead.pid}.tmp"]
    for name in names + used:
        (folder / name).write_bytes(b"part of it")
    (tmp_path / "corpus" / "00-bad.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        build(corpus, folder, quiet)
    assert [name for name in names + used if (folder / name).exists()] == used


def test_tokenizer_learns_nothing_from_heldout_text(tmp_path: Path, documents: Documents) -> None:
    (tmp_path / "train.txt").write_text("plain words only\n" * 100)
    (tmp_path / "valid.txt").write_text("Ωmega Ωmega\n" * 100)
    config = DataConfig(
        (str(tmp_path / "train.txt"),),
        holdout_paths=(str(tmp_path / "valid.txt"),),
        tokenizer=TokenizerConfig(vocab_size=300),
    )
    build(config, tmp_path / "data", quiet)
    tokenizer = read_tokenizer(tmp_path / "data")
    assert not any("Ω" in tokenizer.piece(i) for i in range(tokenizer.vocab_size))
    assert documents(tmp_path / "data", "heldout") == ["Ωmega Ωmega\n" * 100]
    assert documents(tmp_path / "data", "train") == ["plain words only\n" * 100]


def test_tokenizer_sample_is_spread_and_bounded(
    tmp_path: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("".join(f"file {i} line {j}\n" for j in range(2000)))
    config = DataConfig((str(tmp_path),), tokenizer=TokenizerConfig(training_bytes=80_000, vocab_size=300))
    samples: list[list[str]] = []
    train = vocabulary.train_sentencepiece

    def spy(texts, **options):
        samples.append(texts)
        return train(texts, **options)

    monkeypatch.setattr(vocabulary, "train_sentencepiece", spy)
    build(config, tmp_path / ".a", quiet)
    build(config, tmp_path / ".b", quiet)
    assert samples[0] == samples[1]
    assert 40_000 < sum(map(len, samples[0])) < 120_000
    heldout = documents(tmp_path / ".a", "heldout")
    seen = {text.split()[1] for text in samples[0] if text.startswith("file")}
    assert seen == {str(i) for i in range(8)} - {text.split()[1] for text in heldout}


def test_tail_holds_out_the_end_at_a_character(tmp_path: Path, documents: Documents) -> None:
    text = "é" * 50 + "a"  # 101 bytes; 90 % is in the middle of a character, for 0.9 * 101 = 90.9 and 0.5
    (tmp_path / "one.txt").write_text(text)
    for fraction in (0.1, 0.11, 0.5, 0.9):
        config = DataConfig((str(tmp_path / "one.txt"),), holdout_by="tail", holdout_fraction=fraction, tokenizer=BYTES)
        folder = tmp_path / str(fraction)
        build(config, folder, quiet)
        (train,), (heldout,) = documents(folder, "train"), documents(folder, "heldout")
        assert train + heldout == text
        assert 0 <= int((1 - fraction) * 101) - len(train.encode()) <= 1
    ascii_text = "".join(chr(97 + i % 26) for i in range(1115))
    (tmp_path / "two.txt").write_text(ascii_text)
    config = replace(config, paths=(str(tmp_path / "two.txt"),), holdout_fraction=0.1)
    build(config, tmp_path / "ascii", quiet)
    assert documents(tmp_path / "ascii", "train") == [ascii_text[: int(0.9 * 1115)]]


def test_few_documents_still_give_a_heldout_one(tmp_path: Path, documents: Documents) -> None:
    (tmp_path / "a.txt").write_text("one")
    config = DataConfig((str(tmp_path / "*.txt"),), tokenizer=BYTES)
    with pytest.raises(DataError, match=r"only one document.*holdout_by to 'tail'"):
        build(config, tmp_path / "1", quiet)
    (tmp_path / "b.txt").write_text("one")
    with pytest.raises(DataError, match="only one document"):
        build(config, tmp_path / "1", quiet)
    (tmp_path / "c.txt").write_text("two")
    build(config, tmp_path / "2", quiet)
    assert sorted([documents(tmp_path / "2", "train"), documents(tmp_path / "2", "heldout")]) == [
        ["one", "one"],
        ["two"],
    ]
    none = build(replace(config, holdout_fraction=0.0), tmp_path / "3", quiet)
    assert none.splits["heldout"] == ()
    assert none.documents("train") == 3


def test_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    config = DataConfig((str(tmp_path / "a.txt"),), tokenizer=BYTES)
    with pytest.raises(DataError, match="no document with text"):
        build(config, tmp_path / "1", quiet)
    with pytest.raises(DataError, match="no document to train on"):
        build(replace(config, holdout_fraction=0.0), tmp_path / "2", quiet)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match="no text was held out"):
        build(
            replace(config, paths=(str(tmp_path / "b.txt"),), holdout_paths=(str(tmp_path / "a.txt"),)),
            tmp_path / "3",
            quiet,
        )


def test_bad_text_in_a_process_is_reported_as_it_is(corpus: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "corpus" / "rows.jsonl").open("a").write("{broken\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:401: not JSON"):
        build(replace(corpus, workers=2), tmp_path / "data", quiet)


def test_other_settings_than_those_of_the_build_are_refused(corpus: DataConfig, tmp_path: Path) -> None:
    folder, source = tmp_path / "data", tmp_path / "corpus"
    build(corpus, folder, quiet)

    def refused(message: str, config: DataConfig) -> None:
        with pytest.raises(DataError, match=message) as caught:
            build(config, folder, quiet)
        assert "choose another data.dir" in str(caught.value)

    refused(r"data\.holdout_fraction: built with 0\.1, now 0\.2", replace(corpus, holdout_fraction=0.2))
    refused(r"data\.tokenizer: ", replace(corpus, tokenizer=TokenizerConfig()))
    write_corpus(tmp_path / "another", files=2, seed=1)
    refused(r"another/00\.txt: new", replace(corpus, paths=(str(tmp_path / "another"),)))
    shutil.rmtree(source)
    refused("holdout_fraction", replace(corpus, holdout_fraction=0.2))


def change(source: Path, what: str) -> str:
    """Changes a corpus in one way and gives what is said of it."""
    file = source / "03.txt"
    old = file.read_bytes()
    if what == "new":
        (source / "new.txt").write_text("new")
        return r"new\.txt: new"
    if what == "gone":
        file.unlink()
        return r"03\.txt: gone"
    if what == "longer":
        file.write_bytes(old + b"!")
        return rf"03\.txt: {len(old)} bytes before, now {len(old) + 1}"
    file.write_bytes(b"~" * len(old))
    return r"03\.txt: other content, of the same size"


@pytest.mark.parametrize("what", ["new", "gone", "longer", "other"])
def test_sources_that_change(corpus: DataConfig, tmp_path: Path, contents: Contents, what: str) -> None:
    folder = tmp_path / "data"
    first = build(corpus, folder, quiet)
    before = contents(folder)
    said = change(tmp_path / "corpus", what)
    messages: list[str] = []
    assert build(corpus, folder, messages.append) == first
    assert messages == [f"sources changed since; using the data as built; delete {folder} to build anew"]
    assert contents(folder) == before
    (folder / "manifest.json").unlink()  # a build that is not finished cannot go on with other text
    with pytest.raises(DataError, match=said):
        build(corpus, folder, quiet)


def test_sources_that_are_the_same_or_not_here(corpus: DataConfig, tmp_path: Path) -> None:
    folder, source = tmp_path / "data", tmp_path / "corpus"
    messages: list[str] = []
    first = build(replace(corpus, paths=(*corpus.paths, str(source / "*.txt"))), folder, quiet)
    os.utime(source / "03.txt", ns=(1, 1))
    assert build(corpus, folder, messages.append) == first  # the same files: a new time, named in another way
    assert not messages
    shutil.rmtree(source)
    assert build(corpus, folder, messages.append) == first
    assert "not here" in messages[0]


def test_built_data_that_cannot_be_written_is_used_with_new_copies_of_its_sources(
    corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(corpus, tmp_path / "data", quiet)
    os.utime(tmp_path / "corpus" / "03.txt", ns=(1, 1))

    def read_only(path: epath.Path, content: dict[str, Any]) -> None:
        raise StorageError(f"cannot write {path}: Read-only file system")

    monkeypatch.setattr(files, "write_json", read_only)
    assert build(corpus, tmp_path / "data", quiet) == first


def test_one_of_several_sources_is_gone(corpus: DataConfig, tmp_path: Path) -> None:
    write_corpus(tmp_path / "another", files=2, seed=1)
    both = replace(corpus, paths=(*corpus.paths, str(tmp_path / "another")))
    first = build(both, tmp_path / "data", quiet)
    shutil.rmtree(tmp_path / "another")
    messages: list[str] = []
    assert build(both, tmp_path / "data", messages.append) == first
    assert "sources changed since" in messages[0]


def test_what_failed_before_the_first_part_binds_to_nothing(corpus: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    bad = tmp_path / "corpus" / "00-bad.txt"
    bad.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"00-bad\.txt"):
        build(corpus, folder, quiet)
    bad.unlink()
    with pytest.raises(DataError, match="or more"):
        build(replace(corpus, tokenizer=TokenizerConfig(vocab_size=100)), folder, quiet)
    trained = replace(corpus, tokenizer=TokenizerConfig(vocab_size=400))
    (folder / plan.PLAN).write_text("{")
    shutil.copy(write_other_tokenizer(tmp_path), folder / "tokenizer.model")  # as trained for that plan
    assert build(trained, folder, quiet) == build(trained, tmp_path / "whole", quiet)


def write_other_tokenizer(folder: Path) -> Path:
    (folder / "other.txt").write_text("plain words only\n" * 100)
    config = DataConfig(
        (str(folder / "other.txt"),), holdout_fraction=0.0, tokenizer=TokenizerConfig(vocab_size=300), workers=1
    )
    build(config, folder / "other", quiet)
    return folder / "other" / "tokenizer.model"


def test_of_two_builds_at_once_the_second_waits(corpus: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = build(corpus, tmp_path / "first", quiet)
    messages: list[str] = []
    said = threading.Event()

    def progress(message: str) -> None:
        messages.append(message)
        said.set()

    with concurrent.futures.ThreadPoolExecutor() as pool:
        with sole_writer(epath.Path(folder), lambda: None):
            second = pool.submit(build, corpus, folder, progress)
            assert said.wait(30)
            assert not second.done()
            shutil.copytree(tmp_path / "first", folder, dirs_exist_ok=True)
        assert second.result(30) == first
    assert messages == [f"another process is building {folder}; waiting for it"]


def test_a_build_that_ends_early_ends_its_processes() -> None:
    sleep: Any = time.sleep
    running = workers.run(sleep, [0, 60], workers=2)
    assert next(running) == 0
    begun = time.monotonic()
    running.close()
    with pytest.raises(TypeError):
        list(workers.run(sleep, ["not seconds", 60], workers=2))
    assert time.monotonic() - begun < 30
    assert not multiprocessing.active_children()


def test_a_tokenizer_file_that_changed_is_refused(corpus: DataConfig, tmp_path: Path) -> None:
    folder, model = tmp_path / "data", tmp_path / "my.model"
    trained = replace(corpus, tokenizer=TokenizerConfig(vocab_size=400))
    build(trained, folder, quiet)
    model.write_bytes((folder / "tokenizer.model").read_bytes())
    given = replace(corpus, tokenizer=TokenizerConfig(path=str(model)))
    manifest = build(given, tmp_path / "given", quiet)
    assert manifest.fingerprint == read_manifest(folder).fingerprint
    build(replace(trained, tokenizer=TokenizerConfig(vocab_size=300)), tmp_path / "other", quiet)
    model.write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match=r"my\.model: changed since"):
        build(given, tmp_path / "given", quiet)
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    with pytest.raises(DataError, match="not the tokenizer that the data was built with"):
        read_tokenizer(folder)


def test_fingerprint_says_what_is_trained_on_and_no_more(corpus: DataConfig, tmp_path: Path) -> None:
    one = build(corpus, tmp_path / "one", quiet)
    shutil.copytree(tmp_path / "corpus", tmp_path / "elsewhere")
    moved = replace(corpus, paths=(str(tmp_path / "elsewhere"),))
    assert build(moved, tmp_path / "two", quiet).fingerprint == one.fingerprint
    (tmp_path / "elsewhere" / "03.txt").write_text("changed")
    assert build(moved, tmp_path / "three", quiet).fingerprint != one.fingerprint


def test_a_plan_that_cannot_be_read(corpus: DataConfig, tmp_path: Path) -> None:
    build(corpus, tmp_path / "data", quiet)
    path = tmp_path / "data" / plan.PLAN
    good = path.read_text()
    for bad, message in [(good[:50], "unreadable"), (good.replace('"format": 1', '"format": 9'), "format 9")]:
        path.write_text(bad)
        with pytest.raises(DataError, match=message):
            build(corpus, tmp_path / "data", quiet)


def test_a_record_of_a_part_that_is_damaged_is_named(corpus: DataConfig, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    first = build(corpus, folder, quiet)
    (folder / "manifest.json").unlink()
    for content in ("", "{}", "[]"):
        (folder / "part-00001.json").write_text(content)
        with pytest.raises(DataError, match=r"part-00001\.json: unreadable .* delete it"):
            build(corpus, folder, quiet)
    (folder / "part-00001.json").unlink()
    assert build(corpus, folder, quiet) == first


def test_a_manifest_names_no_files_elsewhere(corpus: DataConfig, tmp_path: Path) -> None:
    build(corpus, tmp_path / "data", quiet)
    path = tmp_path / "data" / "manifest.json"
    good = path.read_text()
    for name in ("train-00000.array_record", "tokenizer.bytes"):
        path.write_text(good.replace(name, f"../{name}"))
        with pytest.raises(DataError, match=rf"manifest\.json: '\.\./{name}' is no name of a file beside it"):
            read_manifest(tmp_path / "data")


def test_another_size_of_parts_does_not_make_built_data_useless(
    corpus: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(corpus, tmp_path / "data", quiet)
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 50_000)
    assert build(corpus, tmp_path / "data", quiet) == first


def test_what_cannot_be_written(corpus: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write "):
        build(corpus, tmp_path / "file" / "data", quiet)


def test_standard_library(tmp_path: Path, documents: Documents, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = sources.list_files
    monkeypatch.setattr(
        sources,
        "list_files",
        lambda *paths: [f for f in listed(*paths) if f.name.startswith(("python-stdlib/j", "python-stdlib/e"))],
    )
    config = DataConfig(("python-stdlib",), tokenizer=BYTES, holdout_fraction=0.2, workers=1)
    manifest = build(config, tmp_path / "data", quiet)
    train, heldout = (set(documents(tmp_path / "data", split)) for split in ("train", "heldout"))
    assert train
    assert heldout
    assert not train & heldout
    assert set(manifest.sources) == {"python-stdlib"}
    for path in (tmp_path / "data").glob("*.json"):
        assert sys.prefix not in path.read_text()
