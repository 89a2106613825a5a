"""The train step: one function for training, planning, benchmarks and tests."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.experiment import Config
from lm.model.loss import Batch, LossSums, next_token_loss
from lm.model.transformer import bind, compute_dtype
from lm.optim.optimizer import optimizer
from lm.optim.schedules import learning_rate
from lm.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(config: Config) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function from state and batch to the next state and float32 scalars. The caller jits it, donating
    the state.

    A step whose loss, gradient or update is not finite is counted but leaves parameters and optimizer state as
    they were, bit for bit: the old values are selected, so nothing non-finite is ever multiplied into them.
    """
    transformation = optimizer(config.optim)
    schedule = learning_rate(config.optim, config.train.steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
        sums, gradients = _accumulate(config, state.params, batch, key)
        weight = jnp.maximum(sums.weight, 1.0)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        loss, rate = sums.total / weight, schedule(state.step)

        updates, opt_state = transformation.update(gradients, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        grad_norm, update_norm = optax.tree.norm(gradients), optax.tree.norm(updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
        select = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
        params = select(optax.apply_updates(state.params, updates), state.params)
        bad = 1 - finite.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=select(opt_state, state.opt_state),
            skipped=state.skipped + bad,
            bad_streak=(state.bad_streak + 1) * bad,
        )
        metrics = {
            "loss": sums.nll / weight,
            "bits_per_byte": sums.nll / (jnp.log(2.0) * jnp.maximum(sums.bytes, 1.0)),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "update_norm": update_norm,
            "targets": sums.weight,
            "skipped_steps": new_state.skipped,
            "bad_streak": new_state.bad_streak,
        }
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return train_step


def make_eval_step(config: Config) -> Callable[[Any, Batch], LossSums]:
    """The pure function from parameters and batch to the sums of the loss, without dropout and z-loss."""
    dtype = compute_dtype(config.model)

    def eval_step(params: Any, batch: Batch) -> LossSums:
        return next_token_loss(bind(config.model, params), batch, dtype=dtype)

    return eval_step


def _accumulate(config: Config, params: Any, batch: Batch, key: jax.Array) -> tuple[LossSums, Any]:
    """Sums of loss terms and of their gradients, float32, over the microbatches of a batch."""
    train, dtype = config.train, compute_dtype(config.model)

    def total(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, LossSums]:
        model = bind(config.model, params)
        sums = next_token_loss(
            model, part, dtype=dtype, z_loss=train.z_loss, key=key, remat=train.remat, unroll=train.unroll
        )
        return sums.total, sums

    gradient = jax.grad(total, has_aux=True)
    rows = jnp.arange(train.batch_size, dtype=jnp.int32)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)  # one for each row, however it is computed
    if train.accumulation == 1:
        gradients, sums = gradient(params, batch, keys)
        return sums, gradients

    def split(x: jax.Array) -> jax.Array:
        # Every device keeps its rows: row r belongs to microbatch r % accumulation.
        return jnp.swapaxes(x.reshape(-1, train.accumulation, *x.shape[1:]), 0, 1)

    def body(carry: tuple[Any, LossSums], inputs: tuple[Batch, jax.Array]) -> tuple[tuple[Any, LossSums], None]:
        part, part_keys = inputs
        gradients, sums = gradient(params, part, part_keys)
        return jax.tree.map(jnp.add, carry, (gradients, sums)), None

    zeros = jax.tree.map(jnp.zeros_like, params), LossSums(*(jnp.zeros((), jnp.float32) for _ in range(4)))
    parts = jax.tree.map(split, (batch, keys))
    (gradients, sums), _ = jax.lax.scan(body, zeros, parts)
    return sums, gradients
