import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lm.data import sources
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.fertility import report
from lm.data.manifest import Manifest
from lm.data.plan import settings_of
from lm.errors import ConfigError, DataError

ROWS = [{"text": f"row {i}", "n": i} for i in range(40)]
FUNCTIONS = """
def even(record): return record["n"] % 2 == 0
def short(record): return set(record) == {"text"} and len(record["text"]) < 20
def forgets(record): pass
number = 5
"""

Build = Callable[[Path, str], Manifest]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds a file with a filter of the module `lm_test_filters`."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "lm_test_filters.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.delitem(sys.modules, "lm_test_filters", raising=False)

    def build_filtered(path: Path, name: str) -> Manifest:
        config = DataConfig((str(path),), filter=name, tokenizer=TokenizerConfig("bytes"), workers=1)
        return build(config, tmp_path / "data", print)

    return build_filtered


def test_fields_of_lines_and_rows(run: Build, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "x.parquet")
    (source,) = run(folder, "lm_test_filters:even").sources.values()
    assert (source.documents, source.skipped) == (40, {"filtered": 40})


def test_plain_text_has_one_field(run: Build, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for size in range(10, 30):
        (folder / f"{size}.txt").write_text("x" * size)
    (source,) = run(folder, "lm_test_filters:short").sources.values()
    assert (source.documents, source.skipped) == (10, {"filtered": 10})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_test_filters:odd", "has no attribute 'odd'"),
        ("lm_test_filters:number", "a int, not a function"),
        ("lm_no_such_module:even", "No module named 'lm_no_such_module'.*PYTHONPATH"),
    ],
)
def test_wrong_names_are_found_before_anything_is_read(
    run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(sources, "list_files", None)
    with pytest.raises(ConfigError, match=f"data.filter: {name}: .*{message}"):
        run(tmp_path, name)
    with pytest.raises(ConfigError, match=message):
        report(DataConfig((str(tmp_path),), filter=name), print)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_test_filters:forgets", r"data.filter gave None instead of True or False"),
        ("lm_test_filters:even", r"data.filter failed: KeyError\('n'\)"),
    ],
)
def test_failing_functions_name_the_record(run: Build, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(DataError, match=r"x\.jsonl:1: " + message):
        run(tmp_path / "x.jsonl", name)
    with pytest.raises(DataError, match=r"x\.txt: " + message):
        run(tmp_path / "x.txt", name)


def test_another_filter_is_other_data(run: Build, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run(tmp_path / "x.jsonl", "lm_test_filters:even")
    with pytest.raises(DataError, match=r"data\.filter: built with 'lm_test_filters:even', now 'lm_test_filters:odd'"):
        run(tmp_path / "x.jsonl", "lm_test_filters:odd")


def test_plans_without_a_filter_are_as_they_were() -> None:
    assert set(settings_of(DataConfig(("x",)))) == {
        "text_field", "holdout_paths", "holdout_by", "holdout_fraction", "tokenizer",
    }  # fmt: skip


def test_the_name_has_two_parts() -> None:
    problems = list(DataConfig(("x",), filter="package.module.function").check())
    assert problems == [("filter", "must be package.module:function, got 'package.module.function'")]
    assert not list(DataConfig(("x",), filter="package.module:function").check())
