"""The train step: one function for training, planning, benchmarks and tests."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from lm.errors import ConfigError
from lm.experiment import Config
from lm.model.loss import Batch, LossSums, next_token_loss, row_losses
from lm.model.remat import Remat
from lm.model.transformer import bind, compute_dtype
from lm.optim.optimizer import optimizer
from lm.optim.schedules import learning_rate
from lm.parallel.layout import Layout, layout_of, on_each_device
from lm.parallel.mesh import AnyMesh
from lm.parallel.pipeline import split_rows
from lm.parallel.sharding import batch_sharding, rules, spec
from lm.train.compiler import compiler_options
from lm.train.groups import norms
from lm.train.state import TrainState, abstract_state

Metrics = dict[str, jax.Array]


def make_train_step(config: Config, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure function from state and batch to the next state and float32 metrics, all scalars but
    `kind_norms`, of the gradient, and `depth_norms`, of gradient, parameters and update (lm/train/groups.py). The
    caller jits it, donating the state.

    Loss and gradients are computed as lm/parallel/layout.py tells; the update is split by the compiler, which after
    the gradients has nothing left to exchange but norms.

    A step whose loss, gradient or update is not finite, or that spikes (lm/train/guard.py), is counted but leaves
    parameters, optimizer state and statistics as they were, bit for bit: the old values are selected, so nothing
    non-finite is ever multiplied into them. `finite` tells the two apart.
    """
    transformation = optimizer(config.optim)
    schedule = learning_rate(config.optim, config.train.steps)
    compute = _loss_and_gradients(config, mesh)
    on_host = config.train.optimizer_memory == "host"

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
        sums, gradients = compute(state.params, batch, key)
        weight = jnp.maximum(sums.weight, 1.0)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        loss, nll, rate = sums.total / weight, sums.nll / weight, schedule(state.step)

        old_opt_state = _to(jax.memory.Space.Device, state.opt_state) if on_host else state.opt_state
        gradient = norms(gradients, config.model)
        grad_norm = gradient.whole
        updates, opt_state = transformation.update(gradients, old_opt_state, state.params, grad_norm=grad_norm)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        change = norms(updates, config.model)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(change.whole)
        accepted = finite & state.guard.accepts(nll, grad_norm, config.recovery.spike_sigmas)
        params = _select(accepted, optax.apply_updates(state.params, updates), state.params)
        opt_state = _select(accepted, opt_state, old_opt_state)
        bad = 1 - accepted.astype(jnp.int32)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=_to(jax.memory.Space.Host, opt_state) if on_host else opt_state,
            skipped=state.skipped + bad,
            bad_streak=(state.bad_streak + 1) * bad,
            # A batch without targets says nothing.
            guard=_select(accepted & (sums.weight > 0), state.guard.add(nll, grad_norm), state.guard),
        )
        weights = norms(params, config.model)
        metrics = {
            "loss": nll,
            "bits_per_byte": sums.nll / (jnp.log(2.0) * jnp.maximum(sums.bytes, 1.0)),
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "param_norm": weights.whole,
            "update_norm": change.whole,
            "targets": sums.weight,
            "skipped_steps": new_state.skipped,
            "bad_streak": new_state.bad_streak,
            "finite": finite,
            "kind_norms": gradient.kinds,
            "depth_norms": jnp.stack([gradient.depths, weights.depths, change.depths]),
        }
        return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}

    return train_step


def jit_train_step(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """The train step as it runs and as it is planned: the state is donated and comes back where it was."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh))
    return jax.jit(
        make_train_step(config, mesh),
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(mesh, deterministic=config.train.deterministic),
    )


def make_eval_step(config: Config, mesh: Mesh, sources: int = 1) -> Callable[[Any, Batch], LossSums]:
    """The pure function from parameters and batch to the sums of the loss, without dropout and z-loss, of each source
    [sources]: `batch["source"]`, int32 [B], says of which a row is."""
    layout = layout_of(config.mesh, mesh)
    dtype = compute_dtype(config.model, layout.platform)
    check_batch(config, mesh, layout)

    def eval_step(params: Any, batch: Batch) -> LossSums:
        found = row_losses(bind(config.model, params), batch, dtype=dtype, layout=layout)
        own = layout.loss_rows(batch["source"])[:, None] == jnp.arange(sources)
        sums = jax.tree.map(lambda x: jnp.sum(jnp.where(own, x[:, None], 0.0), axis=0), found)
        return jax.tree.map(layout.total, sums)

    specs = _parameter_specs(config, mesh)
    return on_each_device(eval_step, mesh, (specs, _rows(mesh, config)), PartitionSpec())


def check_batch(config: Config, mesh: AnyMesh, layout: Layout) -> None:
    """Raises ConfigError when rows or columns of the batch cannot be shared out evenly."""
    train, table = config.train, rules(config.mesh)
    of = "train.batch_size / train.accumulation"
    rows = train.batch_size // train.accumulation
    spec(("batch",), (rows,), mesh, table, tensor=of)
    rows //= layout.parts("batch")
    if layout.stages > 1 and rows % layout.microbatches:
        raise ConfigError(
            f"{of} leaves {rows} rows to each part of the batch, which do not make "
            f"{layout.microbatches} microbatches of the pipeline (mesh.microbatches, or else mesh.stage)"
        )
    context, tensor = layout.parts("sequence"), layout.parts("residual") // layout.parts("sequence")
    least = (2 * context if context > 1 else 1) * tensor
    if train.sequence_length % least:
        how = [f"twice mesh.context = {2 * context}"] * (context > 1) + [f"mesh.tensor = {tensor}"] * (tensor > 1)
        raise ConfigError(
            f"train.sequence_length = {train.sequence_length} cannot be split by {' times '.join(how)}; "
            f"the nearest that can are {train.sequence_length // least * least} and "
            f"{-(-train.sequence_length // least) * least}"
        )


def _loss_and_gradients(config: Config, mesh: Mesh) -> Callable[[Any, Batch, jax.Array], tuple[LossSums, Any]]:
    """From parameters, batch and key to sums of loss terms and of their gradients, float32, over the whole batch."""
    layout = layout_of(config.mesh, mesh, reduce_dtype=config.train.reduce_dtype)
    check_batch(config, mesh, layout)
    specs, by_row = _parameter_specs(config, mesh), _rows(mesh, config)

    def on_one(params: Any, batch: Batch, rows: jax.Array, key: jax.Array) -> tuple[LossSums, Any]:
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)  # one for each, however it is computed
        sums, gradients = _accumulate(config, layout, params, batch, keys)
        return jax.tree.map(layout.total, sums), layout.finish(gradients, specs)

    everywhere = on_each_device(on_one, mesh, (specs, by_row, by_row, PartitionSpec()), (PartitionSpec(), specs))

    def compute(params: Any, batch: Batch, key: jax.Array) -> tuple[LossSums, Any]:
        return everywhere(params, batch, jnp.arange(config.train.batch_size, dtype=jnp.int32), key)

    return compute


def _accumulate(config: Config, layout: Layout, params: Any, batch: Batch, keys: jax.Array) -> tuple[LossSums, Any]:
    """This device's share of the sums and of their gradients, over the microbatches of its rows."""
    train, dtype = config.train, compute_dtype(config.model, layout.platform)
    remat = Remat(train.remat, train.saved, train.offloaded)

    def total(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, LossSums]:
        model = bind(config.model, params)
        sums = next_token_loss(
            model,
            part,
            dtype=dtype,
            layout=layout,
            z_loss=train.z_loss,
            key=key,
            remat=remat,
            unroll=train.unroll,
        )
        return sums.total, sums

    gradient = jax.grad(total, has_aux=True)
    if train.accumulation == 1:
        gradients, sums = gradient(params, batch, keys)
        return sums, gradients

    def body(carry: tuple[Any, LossSums], inputs: tuple[Batch, jax.Array]) -> tuple[tuple[Any, LossSums], None]:
        part, part_keys = inputs
        gradients, sums = gradient(params, part, part_keys)
        return jax.tree.map(jnp.add, carry, (gradients, sums)), None

    zeros = jax.tree.map(jnp.zeros_like, params), LossSums(*(jnp.zeros((), jnp.float32) for _ in range(4)))
    parts = jax.tree.map(lambda x: split_rows(x, train.accumulation), (batch, keys))
    (gradients, sums), _ = jax.lax.scan(body, zeros, parts)
    return sums, gradients


def _parameter_specs(config: Config, mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding.spec, abstract_state(config, mesh).params)


def _rows(mesh: Mesh, config: Config) -> PartitionSpec:
    return batch_sharding(mesh, rules(config.mesh)).spec


def _select(which: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), new, old)


def _to(space: Any, tree: Any) -> Any:
    """Counts stay where they are."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)
