"""Runs side by side: which are found, what differs, in which order, and how the table looks."""

import json
from pathlib import Path
from typing import Any

import pytest

from lm.cli import main
from lm.errors import ConfigError
from lm.report.runs import compare, differences, find_runs, table

from .made import CONFIG, begun, event, line, made


def config(seed: int = 0, **rest: Any) -> dict[str, Any]:
    return {**CONFIG, "run": {"dir": f"r{seed}", "seed": seed}, **rest}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that is done, one that failed without a step, one that diverged; and things that are no runs."""
    done = [begun(ago=100), event("end", code=0, done=100, milliseconds={"step": 90_000})]
    made(
        tmp_path / "a",
        config=config(1),
        events=done,
        lines=[line(99, loss=4.0, heldout_loss=5, heldout_bits_per_byte=2.5, mfu=0.25)],
    )
    failed = [begun(ago=100), event("end", ago=90, code=3, milliseconds={"start": 10_000})]
    made(tmp_path / "deep" / "er" / "b", config=config(2), events=failed)
    made(tmp_path / "deep" / "c", config=config(3), lines=[line(k, loss="NaN") for k in range(10)])
    (tmp_path / "deep" / "model").mkdir()
    (tmp_path / "deep" / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "a" / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "7" / "config.json").write_text(json.dumps(config(1)))
    made(tmp_path / ".hidden" / "d", config=config(4))
    (tmp_path / "deep" / "back").symlink_to(tmp_path)
    (tmp_path / "text").write_text("")
    return tmp_path


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["run"].rpartition("/")[2] for row in rows]


def test_runs_are_found_at_any_depth_and_not_within_runs(folder: Path) -> None:
    assert [path.name for path in find_runs(folder)] == ["a", "c", "b"]
    assert [path.name for path in find_runs(folder / "a")] == ["a"]
    assert find_runs(folder / "deep" / "model") == []


def test_rows(folder: Path) -> None:
    a, c, b = compare([str(folder), str(folder / "a")], None)
    assert a | {"state": "done", "step": 100, "steps": 100, "tokens": 100_000.0, "loss": 4.0, "mfu": 0.25} == a
    assert a["wall_seconds"] == 90
    assert a["config"] == {"run.seed": 1}
    assert b | {"state": "failed", "step": 0, "loss": None, "tokens_per_second": None, "wall_seconds": 10} == b
    assert c | {"state": "unknown", "step": 10, "loss": "NaN", "tokens_per_second": 2000.0, "mfu": None} == c


def test_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(folder), "--sort", "seed"]) == 0
    lines = capsys.readouterr().out.replace(str(folder), "").splitlines()
    assert [" ".join(row.split()) for row in lines] == [
        "run state step tokens loss held-out b/B tokens/s MFU time seed",
        "/a done 100/100 100k 4.0000 2.5000 2.00k 25.0% 1m30s 1",
        "/deep/er/b failed 0/100 10s 2",
        "/deep/c unknown 10/100 10.0k nan 2.00k 3",
    ]
    assert main(["runs", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_what_is_too_wide_is_named() -> None:
    row = {
        **dict.fromkeys(("tokens", "loss", "heldout_bits_per_byte", "tokens_per_second", "mfu", "wall_seconds")),
        "run": "r",
        "state": "done",
        "step": 1,
        "steps": 2,
        "config": {"a.x": "v" * 100, "a.y": 1, "b.y": 2},
    }
    head, values, rest = table([row], 20)
    assert (head.split(), values.split()) == (["run", "state", "step"], ["r", "done", "1/2"])
    assert rest == "too wide for this terminal: a.x, a.y, b.y; --json has them"
    head, values = table([row], None)
    assert head.split() == ["run", "state", "step", "x", "a.y", "b.y"]
    assert values.split()[3] == "v" * 18 + "…" + "v" * 20


def test_what_differs_between_configs() -> None:
    base = {"run": {"dir": "a"}, "m": {"w": 1, "t": "x", "paths": ["p"], "part": None, "list": [{"k": 1}]}}
    same = {"run": {"dir": "b"}, "m": dict(base["m"])}
    assert differences([base, same, {}]) == [{}, {}, {}]
    older = {"run": {"dir": "c"}, "m": {"w": 1, "t": "x", "paths": ["p"], "part": None}}
    assert differences([base, older]) == [{}, {}]  # that it lacks a key says nothing
    other = {"run": {"dir": "c"}, "m": {"w": 2, "t": "x", "paths": ["p", "q"], "part": {"z": 3}, "list": []}}
    assert differences([base, other]) == [
        {"m.w": 1, "m.paths": ["p"], "m.list.0.k": 1},
        {"m.w": 2, "m.paths": ["p", "q"], "m.part.z": 3},
    ]


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("run", "acb"),
        ("step", "bca"),
        ("loss", "acb"),
        ("MFU", "acb"),
        ("time", "bac"),
        ("run.seed", "abc"),
        ("state", "abc"),
    ],
)
def test_order(folder: Path, sort: str, order: str) -> None:
    assert "".join(names(compare([str(folder)], sort))) == order


def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="'los'; did you mean 'loss'"):
        compare([str(folder)], "los")
    with pytest.raises(ConfigError, match=r"there are .*run\.seed"):
        compare([str(folder)], "zzzz")
    with pytest.raises(ConfigError, match="no runs in"):
        compare([str(folder / "deep" / "model")], None)
    for path in (folder / "none", folder / "text"):
        assert main(["runs", str(path)]) == 2
        assert capsys.readouterr().err == f"lm: {path} is no folder\n"


def test_damaged_runs_are_in_the_table_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path / "a\x1b[2J", config='{"run"', events=[begun(host="elsewhere", ago=900)], lines="\x00\n{")
    made(tmp_path / "b", config=None, events=[begun()])
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert [row.split()[1] for row in printed.splitlines()] == ["state", "silent", "killed"]
