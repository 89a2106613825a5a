from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.errors import ConfigError
from lm.generate.sampling import Sampling, filter_logits, sample


def kept(logits: list[float], **settings: Any) -> list[int]:
    filtered = filter_logits(jnp.array([logits], jnp.float32), Sampling(**settings))
    return np.flatnonzero(np.isfinite(filtered[0])).tolist()


def obvious(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities that are drawn from, by sorting, in float64."""

    def softmax(x: np.ndarray) -> np.ndarray:
        weights = np.exp(x - x.max())
        return weights / weights.sum()

    logits = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k:
        logits = np.where(logits < np.sort(logits)[::-1][: sampling.top_k][-1], -np.inf, logits)
    if sampling.top_p < 1:
        order = np.argsort(-softmax(logits))
        count = np.searchsorted(np.cumsum(softmax(logits)[order]), sampling.top_p) + 1
        logits = np.where(np.isin(np.arange(len(logits)), order[:count]), logits, -np.inf)
    if sampling.min_p:
        logits = np.where(softmax(logits) < sampling.min_p * softmax(logits).max(), -np.inf, logits)
    return softmax(logits)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(top_k=5),
        Sampling(top_p=0.7),
        Sampling(min_p=0.1),
        Sampling(temperature=1.5, top_k=9, top_p=0.8, min_p=0.15),
    ],
    ids=str,
)
def test_filters_agree_with_the_obvious_reference(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (20, 33)).astype(np.float32)
    got = jax.nn.softmax(filter_logits(jnp.array(logits), sampling))
    np.testing.assert_allclose(got, [obvious(row, sampling) for row in logits], atol=1e-6)


def test_filters_see_tempered_and_renormalised_probabilities() -> None:
    logits = np.log([0.5, 0.25, 0.15, 0.1]).tolist()
    assert kept(logits, top_p=0.74) == [0, 1]
    assert kept(logits, temperature=0.5, top_p=0.74) == [0, 1]  # squares: 0.725, 0.181, …
    assert kept(logits, temperature=0.5, top_p=0.72) == [0]
    assert kept(logits, top_k=2, top_p=0.66) == [0]  # 2/3 of what top-k left
    assert kept(logits, temperature=0.5, min_p=0.3) == [0]  # ratio 1/4 after tempering
    assert kept(logits, min_p=0.3) == [0, 1, 2]


def test_edges_and_ties() -> None:
    assert kept([0.0, 3.0, 1.0], top_k=100) == [0, 1, 2]
    assert kept([1.0, 3.0, 3.0, 2.0, 2.0], top_k=1) == [1, 2]
    assert kept([1.0, 3.0, 3.0, 2.0, 2.0], top_k=3) == [1, 2, 3, 4]
    assert kept([0.0, 3.0, 1.0], top_p=1e-9) == [1]
    assert kept([1.0, 1.0, 1.0], top_p=0.5) == [0, 1, 2]
    assert kept([0.0, 0.0, -100.0], top_p=0.5) == [0, 1]
    assert kept([2.0, 3.0, 3.0], min_p=1.0) == [1, 2]
    assert kept([7.0], top_k=1, top_p=0.1, min_p=1.0) == [0]
    coldest = filter_logits(jnp.array([[1.0, 3.0, 2.0]]), Sampling(temperature=1e-38))
    assert jax.nn.softmax(coldest).tolist() == [[0.0, 1.0, 0.0]]


def test_draws_follow_the_distribution() -> None:
    count = 4000
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5], np.float32)
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.95)
    keys = jax.random.split(jax.random.key(3), count)
    ids = np.asarray(sample(jnp.tile(logits, (count, 1)), keys, sampling))
    expected = obvious(logits, sampling)
    # Five standard deviations of a binomial share.
    np.testing.assert_allclose(np.bincount(ids, minlength=5) / count, expected, atol=5 * 0.5 / count**0.5)
    assert not np.isin(ids, np.flatnonzero(expected == 0)).any()


def test_a_row_depends_on_its_own_key_and_logits_only() -> None:
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    keys = jax.random.split(jax.random.key(1), 6)
    together = sample(logits, keys, Sampling(top_p=0.9))
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], Sampling(top_p=0.9))[0]) for i in range(6)]
    assert together.tolist() == alone
    assert len(set(alone)) > 1


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = jnp.array([[1.0, 4.0, 4.0], [9.0, 0.0, 1.0]])
    assert sample(logits, jax.random.split(jax.random.key(0), 2), Sampling(temperature=0.0)).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.5}, "min_p must be from 0"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_impossible_values_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
