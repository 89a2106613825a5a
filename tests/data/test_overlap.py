"""Training documents that share 13 words in a row with evaluation sets, against sets of tuples of words."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lm.data import overlap, plan
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.errors import DataError

Documents = Callable[[Path, str], list[str]]

WORDS = [f"w{i}" for i in range(500)]


def quiet(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 20_000)


def runs_of(text: str) -> set[tuple[str, ...]]:
    words = re.findall("[a-z0-9]+", text.lower())
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    """Two sources of documents, some of which quote one of three evaluation files of different formats."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(5, 150))) for _ in range(400)]
    quotes = [" ".join(draw.choices(WORDS, k=20)) for _ in range(12)]
    for i, quote in enumerate(quotes[:9]):
        words = quote.split()[: 12 + i % 3]  # one is too short to be found
        texts[7 * i] += "\n" + ", ".join(words).upper() + "!"
    (tmp_path / "one").mkdir()
    for name, some in (("one/a", texts[:200]), ("b", [*texts[200:], texts[3], *texts[14:16]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    rows = [{"id": 7, "question": quote, "answers": [{"text": "short"}, None]} for quote in quotes[:4]]
    (tmp_path / "nested.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "plain.txt").write_text("\n".join(quotes[4:6]))
    table = pyarrow.table({"passage": [*quotes[6:], None], "label": list(range(7))})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    return DataConfig(
        (str(tmp_path / "one"), str(tmp_path / "b.jsonl")),
        tokenizer=TokenizerConfig(kind="bytes"),
        holdout_fraction=0.1,
        workers=1,
        overlap_paths=(str(tmp_path / "*.txt"), str(tmp_path / "nested.jsonl"), str(tmp_path / "table.parquet")),
    )


def evaluation_runs(config: DataConfig) -> dict[str, set[tuple[str, ...]]]:
    folder = Path(config.paths[0]).parent
    rows = [json.loads(line)["question"] for line in (folder / "nested.jsonl").open()]
    passages = pyarrow.parquet.read_table(folder / "table.parquet").column("passage").to_pylist()
    texts = {"nested.jsonl": rows, "plain.txt": [(folder / "plain.txt").read_text()], "table.parquet": passages[:-1]}
    return {str(folder / name): set().union(*map(runs_of, some)) for name, some in texts.items()}


def test_report_counts_and_removes_nothing(config: DataConfig, tmp_path: Path, documents: Documents) -> None:
    lines: list[str] = []
    manifest = build(config, tmp_path / "data", lines.append)
    plain = build(replace(config, overlap_paths=()), tmp_path / "plain", quiet)
    assert plain.fingerprint == manifest.fingerprint
    assert plain.overlap is None
    assert not list((tmp_path / "data").glob("overlap*"))  # what was looked for is not left behind
    assert manifest.overlap is not None
    train = documents(tmp_path / "data", "train")
    for name, runs in evaluation_runs(config).items():
        expected = sum(bool(runs & runs_of(text)) for text in train)
        found = sum(counts.get(name, 0) for counts in manifest.overlap["documents"].values())
        assert found == expected
        assert any(
            line.startswith(f"{expected} training documents share 13 words in a row with {name}") for line in lines
        )
    assert set(manifest.overlap["documents"]) == set(config.paths)
    described = {file["name"].rpartition("/")[2]: file for file in manifest.overlap["files"]}
    assert (described["nested.jsonl"]["texts"], described["nested.jsonl"]["short"]) == (4, 4)
    assert described["plain.txt"]["runs"] == 28  # 40 words, one text
    assert [one["runs"] for one in manifest.overlap["worst"]] == sorted(
        (one["runs"] for one in manifest.overlap["worst"]), reverse=True
    )
    assert not manifest.overlap["removed"]


def test_remove(config: DataConfig, tmp_path: Path, documents: Documents) -> None:
    report = build(config, tmp_path / "report", quiet)
    manifest = build(replace(config, overlap="remove", workers=2), tmp_path / "data", quiet)
    runs = set().union(*evaluation_runs(config).values())
    before, train = (documents(tmp_path / name, "train") for name in ("report", "data"))
    assert train == [text for text in before if not runs & runs_of(text)]
    assert len(before) - len(train) >= 6
    assert sum(source.skipped.get("overlap", 0) for source in manifest.sources.values()) == len(before) - len(train)
    # What is held out is not trained on, so nothing leaks there.
    assert documents(tmp_path / "data", "heldout") == documents(tmp_path / "report", "heldout")
    assert report.overlap is not None
    assert manifest.overlap == report.overlap | {"removed": True}


def test_tail_counts_only_what_is_trained_on(tmp_path: Path) -> None:
    quote = " ".join(WORDS[:20])
    (tmp_path / "a.txt").write_text(" ".join(WORDS[100:200]) + " " + quote)
    (tmp_path / "e.txt").write_text(quote)
    config = DataConfig(
        (str(tmp_path / "a.txt"),),
        holdout_by="tail",
        holdout_fraction=0.5,
        tokenizer=TokenizerConfig("bytes"),
        overlap_paths=(str(tmp_path / "e.txt"),),
    )
    manifest = build(config, tmp_path / "data", quiet)
    assert manifest.overlap is not None
    assert manifest.overlap["documents"] == {}


def test_bad_evaluation_sets(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, *paths: str) -> None:
        with pytest.raises(DataError, match=message):
            build(replace(config, overlap_paths=paths), tmp_path / "data", quiet)

    refused(r"data\.overlap_paths: .*missing", str(tmp_path / "missing.jsonl"))
    (tmp_path / "short.jsonl").write_text('{"a": "one two"}\n')
    refused(r"data\.overlap_paths: no text of 13 words", str(tmp_path / "short.jsonl"))
    (tmp_path / "broken.jsonl").write_text("{\n")
    refused(r"broken\.jsonl:1: not JSON", str(tmp_path / "broken.jsonl"))
    monkeypatch.setattr(overlap, "_MOST_RUNS", 50)
    monkeypatch.setattr(overlap, "_BATCH_RUNS", 10)
    refused("more than 50 runs.*name evaluation sets", *config.overlap_paths)


def test_check() -> None:
    assert [field for field, _ in DataConfig(("a",), overlap="remove").check()] == ["overlap"]
    assert [field for field, _ in DataConfig(("a",), near_similarity=0).check()] == ["near_similarity"]
