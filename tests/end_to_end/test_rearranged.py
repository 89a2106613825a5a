"""A run with fill-in-the-middle and prefixes: built, trained, stopped, gone on with, looked at."""

import json
from collections.abc import Callable
from pathlib import Path

from .conftest import Lm

FILLED = """
import dataclasses
from tiny import config as tiny
from lm.data.config import TokenizerConfig

data = dataclasses.replace(
    tiny.data, tokenizer=TokenizerConfig(vocab_size=300), fim_rate=0.5, prefix_rate=0.5, packing="best_fit"
)
config = dataclasses.replace(
    tiny, data=data, model=dataclasses.replace(tiny.model, vocab_size=300, windows=(9, 0), layers=2)
)
"""


def test_a_run_that_is_stopped_sees_the_same(
    lm: Lm, workplace: Path, logged: Callable[[Path], list[dict[str, float]]]
) -> None:
    (workplace / "filled.py").write_text(FILLED)
    ended = lm("train", "filled.py", "--run.dir", "filled")
    assert ended.stderr == ""
    lm("train", "filled.py", "--run.dir", "filled-stopped", code=75, after=6)
    lm("train", "filled.py", "--run.dir", "filled-stopped")
    assert logged(workplace / "filled") == logged(workplace / "filled-stopped")
    lines = logged(workplace / "filled")
    assert any("heldout_loss" in line for line in lines)
    manifest = json.loads((workplace / "filled" / "data" / "manifest.json").read_text())
    (source,) = manifest["sources"].values()
    assert 5 < source["fim_documents"] < 35
    shown = lm("data", "show", "filled", "--step", "0").stdout
    more = (
        shown + lm("data", "show", "filled", "--step", "1").stdout + lm("data", "show", "filled", "--step", "2").stdout
    )
    for name in ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"):
        assert name in more
    rows = [line for line in shown.splitlines() if "── row" in line]
    assert sum(int(row.removesuffix(" trained").rsplit(" ", 1)[1]) for row in rows) == lines[0]["targets"]
    targets = [line["targets"] for line in lines]
    assert 0.5 * 4 * 32 < sum(targets) / len(targets) < 0.9 * 4 * 32


def test_no_such_marks(lm: Lm, workplace: Path) -> None:
    ended = lm("train", "tiny.py", "--run.dir", "none", "--data.fim_rate", "0.5", code=2)
    assert "data.fim_rate: the bytes tokenizer has no tokens to mark prefix, suffix and middle" in ended.stderr
