"""The train step: one result, however the batch is cut and the state laid out, and nothing from a bad step."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import Config
from lm.kernels.attention import Places
from lm.model.config import ModelConfig
from lm.model.transformer import bind
from lm.optim.config import OptimConfig
from lm.optim.optimizer import paths
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import batch_sharding
from lm.train.config import TrainConfig
from lm.train.groups import groups_of
from lm.train.state import TrainState, abstract_state, init_state
from lm.train.step import Metrics, jit_train_step, make_eval_step, make_train_step

V, B, S = 32, 8, 16

CONFIG = Config(
    model=ModelConfig(vocab_size=V, layers=2, width=16, heads=4, kv_heads=2, embeddings="untied"),
    optim=OptimConfig(learning_rate=0.01, warmup_steps=0, schedule="constant", clip_norm=None),
    train=TrainConfig(steps=10, batch_size=B, sequence_length=S, z_loss=1e-2),
)


ONE = make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Rows of two documents and padding; from one to nearly all of a row's targets count."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(V, size=(B, S + 1)).astype(np.int32)
    segments, positions = np.zeros((B, S), np.int32), np.zeros((B, S), np.int32)
    for row in range(B):
        begin, end = draw.integers(2, S // 2), draw.integers(S // 2 + 1, S + 1)
        segments[row, :begin], segments[row, begin:end] = 1, 2
        positions[row, :begin], positions[row, begin:end] = np.arange(begin), np.arange(end - begin)
    mask = (segments > 0) & (np.arange(S) < np.arange(1, 2 * B, 2)[:, None])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "positions": positions,
        "loss_mask": mask.astype(np.float32),
        "bytes": (mask.sum(1) * 3).astype(np.int32),
    }


def config(**train: Any) -> Config:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **train))


@jax.jit
def draw_state() -> TrainState:
    return init_state(CONFIG, jax.random.key(0))


@functools.cache
def compiled(config: Config) -> Any:
    return jax.jit(make_train_step(config, ONE))


def run(config: Config, state: TrainState, steps: int = 1) -> tuple[TrainState, Metrics]:
    step = compiled(config)
    for k in range(steps):
        state, metrics = step(state, make_batch(k))
    return state, metrics


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def first_moments(state: TrainState) -> dict[tuple[str, ...], np.ndarray]:
    """A tenth of the gradient, after one step without clipping."""
    mu = next(part.mu for part in state.opt_state if hasattr(part, "mu"))
    return dict(zip(paths(mu), map(np.asarray, jax.tree.leaves(mu)), strict=True))


def assert_same_gradients(state: TrainState, expected: TrainState) -> None:
    """Within 1e-5 of each tensor's largest value."""
    found = first_moments(state)
    for path, gradient in first_moments(expected).items():
        assert np.abs(gradient).max() > 0, path
        np.testing.assert_allclose(
            found[path], gradient, rtol=0, atol=1e-5 * np.abs(gradient).max(), err_msg=".".join(path)
        )


def reference_nll(params: Any, batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """Summed over the targets, and with the z-loss, from whole logits."""
    model = bind(CONFIG.model, params)
    tokens, segments, positions = (jnp.asarray(batch[name]) for name in ("tokens", "segments", "positions"))
    hidden, _ = model(tokens, Places(segments, positions), dtype=jnp.dtype(jnp.float32))
    logits = np.asarray(model.logits(hidden), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    mask = batch["loss_mask"]
    return float((nll * mask).sum()), float(((nll + CONFIG.train.z_loss * log_z**2) * mask).sum())


@pytest.fixture(scope="module")
def once() -> tuple[TrainState, Metrics]:
    """After one step on the whole batch, on one device."""
    return run(CONFIG, draw_state())


def test_metrics_are_what_their_names_say(once: tuple[TrainState, Metrics]) -> None:
    before, batch, (after, metrics) = draw_state(), make_batch(0), once
    nll, total = reference_nll(before.params, batch)
    weight, size = batch["loss_mask"].sum(), batch["bytes"].sum()
    assert metrics["loss"] == pytest.approx(nll / weight, rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(nll / size / math.log(2), rel=1e-5)
    assert metrics["targets"] == weight
    assert metrics["learning_rate"] == pytest.approx(0.01)
    assert (metrics["skipped_steps"], metrics["bad_streak"]) == (0, 0)

    def norm(leaves: Any) -> float:
        return math.sqrt(sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in leaves))

    change = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, after.params, before.params)
    assert metrics["grad_norm"] == pytest.approx(10 * norm(first_moments(after).values()), rel=1e-4)
    by_group = dict(zip(groups_of(CONFIG.model).kinds, metrics["kind_norms"], strict=True))
    for group, path in {"output": ("output",), "attention/key": ("layers", "0", "attention", "key")}.items():
        assert by_group[group] == pytest.approx(10 * norm([first_moments(after)[path]]), rel=1e-4)
    assert norm(by_group.values()) == pytest.approx(float(metrics["grad_norm"]), rel=1e-6)
    assert metrics["update_norm"] == pytest.approx(norm(jax.tree.leaves(change)), rel=1e-4)
    assert metrics["param_norm"] == pytest.approx(norm(jax.tree.leaves(after.params)), rel=1e-5)
    assert all(value.dtype == jnp.float32 for value in metrics.values())
    assert {name for name, value in metrics.items() if value.shape} == {"kind_norms", "depth_norms"}
    of_depths = np.linalg.norm(metrics["depth_norms"], axis=1)
    assert of_depths == pytest.approx([float(metrics[f"{one}_norm"]) for one in ("grad", "param", "update")], rel=1e-6)
    own = jax.device_put(batch | {"source": np.zeros(len(batch["bytes"]), np.int32)})
    sums = make_eval_step(CONFIG, ONE)(before.params, own)
    assert (float(sums.total[0]), float(sums.weight[0])) == (pytest.approx(nll, rel=1e-5), weight)
    assert total > nll


def test_the_gradient_is_that_of_the_loss_with_its_z_term(once: tuple[TrainState, Metrics]) -> None:
    """One entry, by a difference quotient of the reference; float32 logits leave three digits of it."""
    params, batch = draw_state().params, make_batch(0)
    gradient = 10 * first_moments(once[0])["output",]
    row, column = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)

    def loss(shift: float) -> float:
        shifted = params | {"output": params["output"].at[row, column].add(shift)}
        return reference_nll(shifted, batch)[1] / batch["loss_mask"].sum()

    assert (loss(0.05) - loss(-0.05)) / 0.1 == pytest.approx(gradient[row, column], rel=5e-3)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_nothing(parts: int, once: tuple[TrainState, Metrics]) -> None:
    state, metrics = run(config(accumulation=parts), draw_state())
    for name, value in once[1].items():
        assert metrics[name] == pytest.approx(np.asarray(value), rel=1e-5), name
    assert_same_gradients(state, once[0])


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [
        ({"fsdp": 8}, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
        ({"fsdp": 2, "context": 2, "stage": 2}, 1),
    ],
    ids=str,
)
def test_a_mesh_changes_nothing(mesh: dict[str, int], accumulation: int, once: tuple[TrainState, Metrics]) -> None:
    """Of the whole step; loss and gradients on every mesh are in tests/parallel/test_equivalence.py."""
    cut = dataclasses.replace(config(accumulation=accumulation), mesh=MeshConfig(**({"fsdp": 1} | mesh)))
    on = make_mesh(cut.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cut, on))
    state = jax.device_put(draw_state(), shardings)
    batch = jax.device_put(make_batch(0), batch_sharding(on))
    state, metrics = jit_train_step(cut, on)(state, batch)
    for name, value in once[1].items():
        assert metrics[name] == pytest.approx(np.asarray(value), rel=1e-5), name
    assert_same_gradients(state, once[0])
    for found, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert found.sharding.is_equivalent_to(wanted, found.ndim)


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 4}], ids=str)
def test_optimizer_state_on_the_host_changes_nothing(mesh: dict[str, int], once: tuple[TrainState, Metrics]) -> None:
    cut = dataclasses.replace(config(optimizer_memory="host"), mesh=MeshConfig(**({"fsdp": 1} | mesh)))
    on = make_mesh(cut.mesh, jax.devices()[: mesh.get("fsdp", 1)])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cut, on))
    state = jax.device_put(draw_state(), shardings)
    state, metrics = jit_train_step(cut, on)(state, jax.device_put(make_batch(0), batch_sharding(on)))
    assert metrics["loss"] == pytest.approx(float(once[1]["loss"]), rel=1e-6)
    assert_same_gradients(state, once[0])
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}


def test_initial_parameters_do_not_depend_on_the_mesh() -> None:
    on = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(CONFIG, on))
    spread = jax.jit(lambda: init_state(CONFIG, jax.random.key(0)), out_shardings=shardings)()
    for found, expected in zip(jax.tree.leaves(spread), jax.tree.leaves(draw_state()), strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "remat",
    [
        {"remat": "full"},
        {"remat": "names", "saved": ("attention", "feed_forward_up")},
        {"remat": "names", "saved": ("query",), "offloaded": ("attention",)},
    ],
    ids=str,
)
def test_remat_changes_nothing(remat: dict[str, Any], once: tuple[TrainState, Metrics]) -> None:
    state, metrics = run(config(**remat), draw_state())
    assert metrics["loss"] == pytest.approx(float(once[1]["loss"]), rel=1e-6)
    assert_same_gradients(state, once[0])


def test_a_bad_step_leaves_no_trace_but_its_count() -> None:
    step = compiled(CONFIG)
    good, metrics = step(draw_state(), make_batch(0))
    assert float(metrics["update_norm"]) > 0
    state = good
    poisons = (math.nan, math.inf, -math.inf)
    for streak, poison in enumerate(poisons, 1):
        batch = make_batch(1)
        batch["loss_mask"][3, 1] = poison
        state, metrics = step(state, batch)
        assert (int(state.step), int(state.skipped), int(state.bad_streak)) == (1 + streak, streak, streak)
        assert (float(metrics["skipped_steps"]), float(metrics["bad_streak"])) == (streak, streak)
        assert bits((state.params, state.opt_state)) == bits((good.params, good.opt_state))
    state, metrics = step(state, make_batch(1))
    assert (int(state.step), int(state.skipped), int(state.bad_streak)) == (5, 3, 0)
    expected, _ = step(dataclasses.replace(good, step=jnp.int32(4)), make_batch(1))
    assert bits((state.params, state.opt_state)) == bits((expected.params, expected.opt_state))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("name", ["embedding", "output"])
def test_bad_parameters_are_not_spread(name: str, poison: float) -> None:
    """3e38 is finite, and overflows in the first product."""
    state = draw_state()
    poisoned = state.params | {name: state.params[name].at[5].set(poison)}
    before = dataclasses.replace(state, params=poisoned)
    after, metrics = run(CONFIG, before)
    assert (int(after.skipped), float(metrics["bad_streak"])) == (1, 1)
    assert bits((after.params, after.opt_state)) == bits((before.params, before.opt_state))


def test_a_batch_without_targets_is_no_division_by_zero() -> None:
    batch = make_batch(0)
    empty = batch | {"loss_mask": np.zeros_like(batch["loss_mask"]), "bytes": np.zeros_like(batch["bytes"])}
    state, metrics = compiled(CONFIG)(draw_state(), empty)
    assert (float(metrics["loss"]), float(metrics["bits_per_byte"]), int(state.skipped)) == (0, 0, 0)


def test_the_state_is_donated() -> None:
    step = jax.jit(make_train_step(CONFIG, ONE), donate_argnums=0)
    old = draw_state()
    new, _ = step(old, make_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_dropout_is_a_function_of_seed_and_step() -> None:
    noisy = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dropout=0.3))
    other = dataclasses.replace(noisy, run=dataclasses.replace(noisy.run, seed=1))
    state = draw_state()
    step, batch = compiled(noisy), make_batch(0)
    losses = [float(step(state, batch)[1]["loss"]) for _ in range(2)]
    assert losses[0] == losses[1]
    later = dataclasses.replace(state, step=jnp.int32(1))
    assert float(step(later, batch)[1]["loss"]) != losses[0]
    assert float(compiled(other)(state, batch)[1]["loss"]) != losses[0]
