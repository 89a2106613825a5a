import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lm.optim.config import OptimConfig
from lm.optim.schedules import learning_rate


def rates(steps: int, **changes: Any) -> list[float]:
    config = OptimConfig(learning_rate=2.0, final_fraction=0.25, warmup_steps=0)
    rate = learning_rate(dataclasses.replace(config, **changes), steps)
    return jax.vmap(rate)(jnp.arange(steps)).tolist()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_the_warm_up_is_a_line_to_the_full_rate(schedule: str) -> None:
    assert rates(20, schedule=schedule, warmup_steps=4)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_constant() -> None:
    assert rates(5, schedule="constant") == [2.0] * 5


def test_linear_falls_by_the_same_amount_to_the_final_share_at_the_last_step() -> None:
    assert rates(8, schedule="linear", warmup_steps=2) == pytest.approx([1, 2, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5])


def test_cosine_is_half_a_cosine_from_the_full_rate_to_the_final_share() -> None:
    expected = [0.5 + 1.5 * (1 + math.cos(math.pi * k / 6)) / 2 for k in range(1, 7)]
    assert rates(9, schedule="cosine", warmup_steps=3)[3:] == pytest.approx(expected)
    assert rates(9, schedule="cosine", warmup_steps=3)[-1] == pytest.approx(0.5)
    assert rates(4, schedule="cosine", final_fraction=0.0)[-1] == pytest.approx(0, abs=1e-7)


def test_wsd_holds_and_falls_over_the_last_steps() -> None:
    assert rates(10, schedule="wsd", warmup_steps=2, decay_steps=3) == pytest.approx(
        [1, 2, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5]
    )
    assert rates(10, schedule="wsd") == pytest.approx([2] * 8 + [1.25, 0.5])  # a fifth of all
    assert rates(4, schedule="wsd", decay_steps=100) == pytest.approx(rates(4, schedule="linear"))


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_a_warm_up_as_long_as_the_run_or_longer_is_all_there_is(schedule: str) -> None:
    assert rates(4, schedule=schedule, warmup_steps=4) == pytest.approx([0.5, 1, 1.5, 2])
    assert rates(4, schedule=schedule, warmup_steps=8) == pytest.approx([0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_a_run_of_one_step(schedule: str) -> None:
    assert rates(1, schedule=schedule) == pytest.approx([2.0 if schedule == "constant" else 0.5])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"beta2": 1.0}, "beta2"),
        ({"final_fraction": 1.5}, "final_fraction"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"decay_steps": 5}, "decay_steps"),
        ({"schedule": "wsd", "decay_steps": 0}, "decay_steps"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"epsilon": 0.0}, "epsilon"),
    ],
)
def test_values_that_cannot_work(change: dict[str, Any], field: str) -> None:
    [(found, problem)] = OptimConfig(**change).check()
    assert found == field
    assert problem
    assert list(OptimConfig().check()) == []
