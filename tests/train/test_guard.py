"""Which steps are accepted, and that nothing of those that are not stays anywhere."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import check, override
from lm.errors import ConfigError
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import batch_sharding
from lm.train.config import RecoveryConfig, TrainConfig
from lm.train.groups import groups_of
from lm.train.guard import WINDOW, Guard, fresh_guard
from lm.train.state import TrainState, abstract_state, forget, init_state
from lm.train.step import Metrics, jit_train_step, make_train_step

V, B, S = 32, 8, 16
Batch = dict[str, np.ndarray]

CONFIG = Config(
    model=ModelConfig(vocab_size=V, layers=2, width=16, heads=4, kv_heads=2, embeddings="untied"),
    optim=OptimConfig(learning_rate=0.01, warmup_steps=0, schedule="constant"),
    train=TrainConfig(steps=1000, batch_size=B, sequence_length=S),
)
ONE = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


# Statistics, on values made up


@jax.jit
def watch(losses: jax.Array, norms: jax.Array) -> tuple[Guard, jax.Array]:
    """The guard after these steps, and which of them were accepted."""

    def step(guard: Guard, values: tuple[jax.Array, jax.Array]) -> tuple[Guard, jax.Array]:
        accepted = guard.accepts(*values, sigmas=10.0)
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), guard.add(*values), guard), accepted

    return jax.lax.scan(step, fresh_guard(), (losses, norms))


def run_of(noise: str, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses that fall from 11 to 2, norms that fall by a factor of 20, and noise on both."""
    draw = np.random.default_rng(seed)
    kinds = {
        "none": lambda: np.zeros(steps),
        "small": lambda: 0.01 * draw.laplace(size=steps),
        "large": lambda: 0.3 * draw.laplace(size=steps),
        "bursts": lambda: 0.05 * draw.normal(size=steps) * np.where(draw.random(steps) < 0.01, 5, 1),
        "heavy tails": lambda: 0.1 * draw.standard_t(6, size=steps),
    }
    fall = np.exp(-np.arange(steps) / 300)
    return 2 + 9 * fall + kinds[noise](), np.exp(3 * fall + 2 * kinds[noise]())


NOISE = ("none", "small", "large", "bursts", "heavy tails")


def test_statistics_are_plain_at_first_and_exponential_then() -> None:
    values = 3 + np.random.default_rng(0).normal(size=500)
    guard, accepted = watch(values[:100], np.exp(-values[:100]))
    assert accepted.all()
    assert guard.counted == 100
    assert guard.loss.mean == pytest.approx(values[:100].mean(), rel=1e-5)
    assert guard.loss.variance == pytest.approx(values[:100].var(), rel=1e-4)
    assert guard.log_grad_norm.mean == pytest.approx(-values[:100].mean(), rel=1e-5)

    guard, _ = watch(values, np.exp(-values))
    shares = [1 / n if n <= WINDOW else 1 / WINDOW for n in range(1, 501)]
    left = np.cumprod([1.0, *(1 - share for share in shares[:0:-1])])[::-1]  # of each value, after those that follow
    weights = left * shares
    assert weights.sum() == pytest.approx(1)
    mean = (weights * values).sum()
    assert guard.loss.mean == pytest.approx(mean, rel=1e-5)
    assert guard.loss.variance == pytest.approx((weights * (values - mean) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("noise", NOISE)
def test_a_healthy_run_never_trips(noise: str) -> None:
    for seed in range(3):
        _, accepted = watch(*run_of(noise, 20_000, seed))
        assert accepted.all(), np.flatnonzero(~accepted)


@pytest.mark.parametrize("early", [False, True], ids=["clean", "after a spike that was accepted"])
@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("which", ["loss", "norm"])
def test_a_spike_of_a_million_always_trips(which: str, noise: str, early: bool) -> None:
    values = dict(zip(("loss", "norm"), run_of(noise, 2000, 0), strict=True))
    if early:
        values[which][0] *= 1e6
        values[which][5] *= 1e6
    spikes = np.arange(WINDOW + early, 2000, 100)
    values[which][spikes] *= 1e6
    _, accepted = watch(values["loss"], values["norm"])
    np.testing.assert_array_equal(np.flatnonzero(~accepted), spikes)


def test_a_spike_that_was_accepted_does_not_blind() -> None:
    losses, norms = run_of("small", WINDOW + 1, 0)
    losses[0] = losses[5] = 1e6
    losses[WINDOW] = 25
    _, accepted = watch(losses, norms)
    assert list(np.flatnonzero(~accepted)) == [WINDOW]


def test_small_steps_up_are_no_spikes_and_large_ones_are() -> None:
    """Without any noise, one nat and a factor of 10."""
    for loss, norm, usual in ((2.99, 1.0, True), (3.01, 1.0, False), (2.0, 9.9, True), (2.0, 10.1, False)):
        _, accepted = watch(np.array([2.0] * WINDOW + [loss]), np.array([1.0] * WINDOW + [norm]))
        assert accepted[-1] == usual, (loss, norm)


# The step


def make_batch(seed: int, weights: np.ndarray | float = 1.0) -> Batch:
    """Ids that each depend on the one before: something to learn."""
    draw = np.random.default_rng(seed)
    tokens = np.zeros((B, S + 1), np.int32)
    tokens[:, 0] = draw.integers(V, size=B)
    for i in range(S):
        tokens[:, i + 1] = (5 * tokens[:, i] + draw.integers(3, size=B)) % V
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((B, S), np.int32),
        "positions": np.tile(np.arange(S, dtype=np.int32), (B, 1)),
        "loss_mask": np.broadcast_to(np.float32(weights), (B, S)),
        "bytes": np.full(B, S, np.int32),
    }


def opposed(size: float) -> np.ndarray:
    """Weights of which the sum is 1: the terms of the loss and of the gradient count `size` fold, with either sign."""
    weights = np.zeros((B, S), np.float32)
    weights[:, ::2], weights[:, 1::2] = size, -size
    weights[0, 0] += 1
    return weights


def nan_batch(seed: int) -> Batch:
    weights = np.ones((B, S), np.float32)
    weights[3, 1] = math.nan
    return make_batch(seed, weights)


@functools.cache
def compiled(config: Config = CONFIG) -> Any:
    return jax.jit(make_train_step(config, ONE))


@functools.cache
def start() -> TrainState:
    return jax.jit(lambda: init_state(CONFIG, jax.random.key(0)))()


@functools.cache
def trained(steps: int = WINDOW + 2) -> TrainState:
    """After so many steps, all of which were accepted."""
    state = start()
    for k in range(steps):
        state, metrics = compiled()(state, make_batch(k))
    assert int(metrics["skipped_steps"]) == 0
    return state


def bits(state: TrainState) -> list[bytes]:
    """Of all that bad steps must not touch."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.params, state.opt_state, state.guard))]


def assert_no_trace(before: TrainState, bad: list[Batch], *, finite: bool) -> list[Metrics]:
    """Bad steps are counted and not applied, and after them training goes on as if there had been none."""
    state, seen = before, []
    for streak, batch in enumerate(bad, 1):
        state, metrics = compiled()(state, batch)
        seen.append(jax.device_get(metrics))
        assert (int(state.bad_streak), int(state.skipped)) == (streak, int(before.skipped) + streak)
        assert metrics["finite"] == finite
        assert bits(state) == bits(before)
    undisturbed = dataclasses.replace(before, step=state.step)
    for k in range(3):
        state, metrics = compiled()(state, make_batch(500 + k))
        undisturbed, _ = compiled()(undisturbed, make_batch(500 + k))
        assert (int(state.bad_streak), metrics["finite"]) == (0, 1)
        assert bits(state) == bits(undisturbed) != bits(before)
        assert int(state.guard.counted) == int(before.guard.counted) + k + 1
    return seen


def test_nan_in_the_first_steps() -> None:
    assert_no_trace(start(), [nan_batch(0)], finite=False)
    assert_no_trace(trained(1), [nan_batch(1)], finite=False)


def test_ten_bad_steps_in_a_row() -> None:
    kinds = [nan_batch, lambda k: make_batch(k, opposed(math.inf))]
    assert_no_trace(trained(), [kinds[k % 2](k) for k in range(10)], finite=False)


def test_an_infinite_gradient_with_a_finite_loss() -> None:
    """Its squares are not representable."""
    for state in (start(), trained()):
        [metrics] = assert_no_trace(state, [make_batch(7, opposed(1e30))], finite=False)
        assert np.isfinite(metrics["loss"])
        assert metrics["grad_norm"] == math.inf


def test_a_gradient_of_one_group_that_is_not_finite() -> None:
    """Equal logits and large hidden states: the loss is finite and has, but for the output, no gradient."""
    params = trained().params
    params = params | {
        "output": jnp.zeros_like(params["output"]),
        "final_norm": {"scale": jnp.full_like(params["final_norm"]["scale"], 1e4)},
    }
    before = dataclasses.replace(trained(), params=params)
    after, metrics = compiled()(before, make_batch(7, opposed(1e36)))
    norms = dict(zip(groups_of(CONFIG.model).kinds, map(float, metrics["kind_norms"]), strict=True))
    assert np.isfinite(metrics["loss"])
    assert [name for name, norm in norms.items() if not np.isfinite(norm)] == ["output"]
    assert metrics["finite"] == 0
    assert bits(after) == bits(before)


def test_an_update_that_is_not_finite() -> None:
    """An embedding that no token has: neither loss nor gradient see it, weight decay does."""
    tokens = np.minimum(make_batch(0)["tokens"], V - 2)
    params = trained().params
    params = params | {"embedding": params["embedding"].at[V - 1].set(math.nan)}
    before = dataclasses.replace(trained(), params=params)
    after, metrics = compiled()(before, make_batch(0) | {"tokens": tokens})
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    assert (metrics["finite"], int(after.bad_streak)) == (0, 1)
    assert bits(after) == bits(before)


def test_a_spike() -> None:
    """Of a million in loss and gradient at once, and in each of them against the steps before."""
    before = trained()
    [metrics] = assert_no_trace(before, [make_batch(7, opposed(1e6))], finite=True)
    assert metrics["grad_norm"] > 1e5

    _, usual = compiled()(before, make_batch(7))
    for name in ("loss", "log_grad_norm"):
        statistics = getattr(before.guard, name)
        mean = usual["loss"] - 1e6 if name == "loss" else jnp.log(usual["grad_norm"] / 1e6)
        lower = dataclasses.replace(statistics, mean=jnp.float32(mean))
        state = dataclasses.replace(before, guard=dataclasses.replace(before.guard, **{name: lower}))
        after, metrics = compiled()(state, make_batch(7))
        assert (int(after.bad_streak), metrics["finite"]) == (1, 1), name
        assert bits(after) == bits(state)


def test_spikes_pass_before_there_are_statistics_and_where_no_limit_is_asked_for() -> None:
    spike = make_batch(7, opposed(1e6))
    after, _ = compiled()(trained(3), spike)
    assert (int(after.bad_streak), int(after.guard.counted)) == (0, 4)
    unlimited = dataclasses.replace(CONFIG, recovery=RecoveryConfig(spike_sigmas=0))
    after, _ = compiled(unlimited)(trained(), spike)
    assert int(after.bad_streak) == 0
    after, metrics = compiled(unlimited)(trained(), nan_batch(7))
    assert (int(after.bad_streak), metrics["finite"]) == (1, 0)


def test_a_nan_does_not_stop_learning_later() -> None:
    """One that got into statistics would make every step after the first 128 look bad, or make none look bad."""
    state, _ = compiled()(trained(10), nan_batch(0))
    for k in range(WINDOW + 10):
        state, _ = compiled()(state, make_batch(k))
        assert (int(state.bad_streak), int(state.skipped)) == (0, 1)
    state, _ = compiled()(state, make_batch(7, opposed(1e6)))
    assert int(state.bad_streak) == 1


def test_a_batch_without_targets_is_not_counted() -> None:
    after, metrics = compiled()(trained(), make_batch(7, 0.0))
    assert (int(after.bad_streak), metrics["finite"], metrics["loss"]) == (0, 1, 0)
    assert jax.device_get(after.guard) == jax.device_get(trained().guard)


@pytest.mark.parametrize("learning_rate", [0.01, 0.3])
def test_a_real_run_never_trips(learning_rate: float) -> None:
    """Batches of one row with a few targets, and a rate that is good and one that is wild."""
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(CONFIG.optim, learning_rate=learning_rate))
    weights = np.zeros((B, S), np.float32)
    weights[0, -4:] = 1
    state, losses = start(), []
    for k in range(500):
        state, metrics = compiled(config)(state, make_batch(k, weights))
        losses.append(metrics["loss"])
    assert int(state.skipped) == 0
    assert np.std(jax.device_get(losses)) > 0.1


def test_forgetting_begins_anew_and_changes_nothing_else() -> None:
    """As it is called while a run goes on: the state is donated and stays where it is."""
    before = jax.tree.map(jnp.copy, trained())
    after = jax.jit(forget, donate_argnums=0)(before)
    assert jax.device_get(after.guard) == jax.device_get(jax.jit(fresh_guard)())
    expected = dataclasses.replace(trained(), guard=after.guard)
    assert (bits(after), int(after.step)) == (bits(expected), WINDOW + 2)


STORY = [make_batch, nan_batch, lambda k: make_batch(k, opposed(1e6)), make_batch, make_batch]


@pytest.mark.parametrize(("devices", "accumulation"), [(2, 2), (8, 1)])
def test_decisions_do_not_depend_on_the_mesh(devices: int, accumulation: int) -> None:
    """Those of several devices, and of a batch in parts, are those of one."""
    train = dataclasses.replace(CONFIG.train, accumulation=accumulation)
    config = dataclasses.replace(CONFIG, train=train, mesh=MeshConfig(fsdp=devices))
    mesh = make_mesh(config.mesh, jax.devices()[:devices])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    state = jax.device_put(jax.tree.map(np.asarray, trained()), shardings)
    step, expected, steps = jit_train_step(config, mesh), trained(), []
    for k, kind in enumerate(STORY):
        state, metrics = step(state, jax.device_put(kind(k), batch_sharding(mesh)))
        expected, _ = compiled()(expected, kind(k))
        steps.append((int(state.bad_streak), int(metrics["finite"])))
        assert int(state.bad_streak) == int(expected.bad_streak)
    assert steps == [(0, 1), (1, 0), (2, 1), (0, 1), (0, 1)]
    for found, wanted in zip(jax.tree.leaves(state.guard), jax.tree.leaves(expected.guard), strict=True):
        assert found == pytest.approx(float(wanted), rel=1e-4)


# Settings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spike_sigmas", "-1"),
        ("spike_sigmas", "nan"),
        ("spike_sigmas", "inf"),
        ("max_bad_steps", "0"),
        ("rewinds", "-1"),
    ],
)
def test_settings_without_sense(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"recovery\.{key}: must be .*, got|recovery\.{key}: must be .*; got"):
        check(override(Config(), [f"--recovery.{key}={value}"]))
