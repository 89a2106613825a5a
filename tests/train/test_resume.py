"""Which changes to a config go on with a run, and which are another run."""

import pytest

from lm.config import override
from lm.errors import ConfigError
from lm.experiment import Config
from lm.train.resume import refuse_if_changed

BASE = {"train.steps": "100", "optim.warmup_steps": "10"}


def go_on(before: dict[str, str], after: dict[str, str], *, done: int) -> None:
    """As if `done` steps were trained with `before`, and `after` was changed since."""
    saved, config = (
        override(Config(), [f"--{key}={text}" for key, text in values.items()])
        for values in (BASE | before, BASE | before | after)
    )
    refuse_if_changed(saved, config, done=done)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("checkpoint.every", "7"),
        ("checkpoint.keep_last", "9"),
        ("eval.every", "7"),
        ("log.every", "7"),
        ("sample.tokens", "7"),
        ("mesh.data", "4"),
        ("train.accumulation", "2"),
        ("train.remat", "full"),
        ("recovery.max_bad_steps", "7"),
        ("recovery.rewinds", "7"),
        ("run.dir", "elsewhere"),
        ("data.dir", "elsewhere"),
        ("data.workers", "7"),
    ],
)
def test_what_does_not_change_the_result_may_change(key: str, text: str) -> None:
    go_on({}, {key: text}, done=50)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("run.seed", "1"),
        ("model.width", "512"),
        ("model.dropout", "0.1"),
        ("data.paths", "other.txt"),
        ("data.holdout_fraction", "0.5"),
        ("data.tokenizer.kind", "bytes"),
        ("optim.learning_rate", "0.5"),
        ("optim.beta2", "0.5"),
        ("train.batch_size", "8"),
        ("train.sequence_length", "8"),
        ("train.z_loss", "0.1"),
        ("recovery.spike_sigmas", "5"),
    ],
)
@pytest.mark.parametrize("done", [0, 50])  # a state with no step done is drawn from the seed already
def test_what_changes_the_result_is_refused(key: str, text: str, done: int) -> None:
    with pytest.raises(ConfigError, match=f"holds a run with {done} steps done and another config:\n{key}: "):
        go_on({}, {key: text}, done=done)


WSD = {"optim.schedule": "wsd", "optim.decay_steps": "20"}
CONSTANT = {"optim.schedule": "constant"}


@pytest.mark.parametrize(
    ("before", "after", "done"),
    [
        (CONSTANT, {"train.steps": "200"}, 100),
        (CONSTANT, {"train.steps": "60"}, 50),
        (WSD, {"train.steps": "200"}, 80),
        (WSD, {"optim.decay_steps": "50"}, 50),
        (CONSTANT, WSD, 80),
        ({}, {"optim.final_fraction": "0.5"}, 10),
    ],
)
def test_the_schedule_may_change_where_it_has_not_been_yet(
    before: dict[str, str], after: dict[str, str], done: int
) -> None:
    go_on(before, after, done=done)


@pytest.mark.parametrize(
    ("before", "after", "done"),
    [
        ({}, {"train.steps": "200"}, 50),
        ({"optim.schedule": "linear"}, {"train.steps": "200"}, 11),
        (WSD, {"train.steps": "200"}, 81),
        (WSD, {"optim.decay_steps": "50"}, 51),
        (CONSTANT, {"optim.warmup_steps": "20"}, 1),
        ({}, {"optim.final_fraction": "0.5"}, 11),
    ],
)
def test_a_schedule_that_would_have_been_another_is_refused(
    before: dict[str, str], after: dict[str, str], done: int
) -> None:
    [key] = after
    with pytest.raises(ConfigError, match=f"\n{key}: "):
        go_on(before, after, done=done)


def test_a_schedule_is_no_cover_for_other_changes() -> None:
    with pytest.raises(ConfigError, match=r"optim\.beta1") as error:
        go_on(CONSTANT, {"train.steps": "200", "optim.beta1": "0.5"}, done=50)
    assert "train.steps" not in str(error.value)
