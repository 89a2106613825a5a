"""A run of several sources: its mixture changes at a step that was planned, or that was thought of on the way."""

import json
from pathlib import Path

import numpy as np
import pytest

from lm import config as configs
from lm.checkpoint.checkpoints import list_checkpoints, read_attachment
from lm.data.batches import Batches
from lm.data.corpus import open_corpus
from lm.experiment import Config

from .conftest import Lm, Logged

MIXED = """
import dataclasses
from tiny import config as tiny
from lm.data.config import DataConfig, PhaseConfig, SourceConfig, TokenizerConfig

phases = (PhaseConfig(0, (("prose", 3.0), ("numbers", 1.0))), {later})
config = dataclasses.replace(
    tiny,
    data=DataConfig(
        sources=(
            SourceConfig("prose", paths=("text",)),
            SourceConfig("numbers", paths=("numbers.jsonl",), text_field="digits"),
            {more}
        ),
        mixture=phases,
        tokenizer=TokenizerConfig(kind="bytes"),
        holdout_fraction=0.2,
        packing="best_fit",
        workers=1,
    ),
)
"""
LATER = "PhaseConfig(9, (('numbers', 1.0), ('letters', 1.0))),"
LETTERS = "SourceConfig('letters', paths=('letters.txt',), max_epochs=50.0),"


@pytest.fixture(scope="module")
def place(workplace: Path) -> Path:
    rows = ({"digits": " ".join(str(i * j) for j in range(40))} for i in range(60))
    (workplace / "numbers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workplace / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz " * 40)
    (workplace / "mixed.py").write_text(MIXED.format(later="", more=""))
    more = LETTERS.replace("max_epochs", "holdout_paths=('text/1.txt',), max_epochs")
    (workplace / "changed.py").write_text(MIXED.format(later=LATER, more=more))
    return workplace


@pytest.fixture(scope="module")
def planned(lm: Lm, place: Path) -> Path:
    """A run whose mixture changes at step 9, as its config said from the beginning."""
    lm("train", "changed.py", "--run.dir", "planned")
    return place / "planned"


def digest(run: Path, step: int) -> str | None:
    return next(info.digest for info in list_checkpoints(run / "checkpoints") if info.step == step)


def applied(run: Path, step: int) -> list[dict]:
    return json.loads(read_attachment(run / "checkpoints", step, "data.json"))["data"]


def test_a_change_on_the_way_is_the_change_that_was_planned(lm: Lm, place: Path, planned: Path, logged: Logged) -> None:
    lm("train", "mixed.py", "--run.dir", "altered", code=75, after=6)
    done = max(info.step for info in list_checkpoints(place / "altered" / "checkpoints"))
    assert 6 <= done < 9
    ended = lm("train", "changed.py", "--run.dir", "altered")
    assert f"goes on from checkpoint {done}\n" in ended.stdout
    assert f"data from step {done}: from step 0 numbers 25.0% prose 75.0%, from step 9 letters 50.0%" in ended.stdout
    assert digest(place / "altered", 12) == digest(planned, 12)
    assert [one["loss"] for one in logged(place / "altered")] == [one["loss"] for one in logged(planned)]
    ledger = applied(place / "altered", 12)
    assert [one["from_step"] for one in ledger] == [0, done]
    assert [sorted(one["sources"]) for one in ledger] == [["numbers", "prose"], ["letters", "numbers", "prose"]]
    assert ledger[1]["phases"][1] == [9, {"letters": 1.0, "numbers": 1.0}]
    assert [one["from_step"] for one in applied(planned, 12)] == [0]


def test_steps_that_are_done_keep_their_data(lm: Lm, place: Path, planned: Path) -> None:
    before = digest(planned, 12)
    ended = lm("train", planned, "--data.mixture.1.from_step", "8", code=2)
    assert "data.mixture is another one for steps that are done (12 are)" in ended.stderr
    assert "mixture=(PhaseConfig(0, (('numbers', 1.0), ('prose', 3.0))), PhaseConfig(9, " in ended.stderr
    assert digest(planned, 12) == before
    (place / "planned" / "data" / "numbers" / "manifest.json").unlink()
    (place / "planned" / "data" / "numbers" / "plan.json").unlink()
    for path in (place / "planned" / "data" / "numbers").glob("part-*.json"):
        path.unlink()
    ended = lm("train", planned, "--data.sources.1.paths", "text", "--data.sources.1.text_field", "text", code=2)
    assert "was trained on other data than source numbers in" in ended.stderr


def test_all_sources_are_read_in_their_shares(place: Path, planned: Path) -> None:
    config = configs.load(str(planned), Config)
    batches = Batches(open_corpus(planned / "data", config.data), 4, 32, config.run.seed)
    drawn = [np.bincount(batches.places(step)[0], minlength=3).tolist() for step in range(12)]
    assert np.sum(drawn[:9], axis=0).tolist() == [27, 9, 0]
    assert np.sum(drawn[9:], axis=0).tolist() == [0, 6, 6]


def test_too_many_epochs_are_refused_before_training(lm: Lm, place: Path) -> None:
    ended = lm("train", "changed.py", "--run.dir", "often", "--data.sources.2.max_epochs", "0.01", code=2)
    assert "letters: " in ended.stderr
    assert "epochs in 12 steps, more than its max_epochs of 0.01" in ended.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.mixture.0.weights", "(('prose', -1.0),)"], "data.mixture.0.weights: must be numbers of at least 0"),
        (["--data.mixture.0.weights", "(('prosa', 1.0),)"], "no source is called 'prosa'; did you mean 'prose'?"),
        (["--data.mixture.0.weights", "(('prose', 0.0),)"], "data.mixture.0.weights: no source has a weight above 0"),
        (["--data.mixture.0.from_step", "1"], "data.mixture.0.from_step: must be 0, got 1"),
        (["--data.sources.1.name", "prose"], "data.sources: two are called 'prose'"),
        (["--data.paths", "text"], "data.paths: is of a single source"),
    ],
)
def test_mistakes_in_a_mixture(lm: Lm, place: Path, options: list[str], message: str) -> None:
    assert message in lm("train", "mixed.py", "--run.dir", "never", *options, code=2).stderr
