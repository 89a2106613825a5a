"""Everything that changes during training, as one pytree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.errors import ConfigError
from lm.experiment import Config
from lm.model.transformer import init_params, parameter_axes
from lm.optim.optimizer import optimizer
from lm.parallel.mesh import AnyMesh
from lm.parallel.sharding import check_table, like_parameters, rules, tree_shardings
from lm.train.guard import Guard, fresh_guard


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "skipped", "bad_streak", "guard"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """After `step` steps. Randomness is not here: it is a function of the seed and the step."""

    step: jax.Array
    """int32, steps done, those not applied included: the clock of data and schedule."""
    params: Any
    """float32 master weights."""
    opt_state: Any
    skipped: jax.Array
    """int32, steps that were not accepted (lm/train/guard.py) and so not applied."""
    bad_streak: jax.Array
    """int32, how many of them came last, in a row."""
    guard: Guard


def init_state(config: Config, key: jax.Array) -> TrainState:
    """The state at step 0. To be jitted with the shardings of `abstract_state`."""
    params = by_repeats(init_params(config.model, key), config.mesh.repeats)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer(config.optim).init(params), zero, zero, fresh_guard())


def forget(state: TrainState) -> TrainState:
    """The state with statistics that begin anew: what comes now is not like what came before."""
    return dataclasses.replace(state, guard=fresh_guard())


def abstract_state(config: Config, mesh: AnyMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing. Raises ConfigError for layouts that fail."""
    shapes = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    shardings = like_parameters(shapes, shapes.params, parameter_shardings(config, mesh, shapes.params), mesh)
    if config.train.optimizer_memory == "host":
        # Counts stay: what is computed with them is, by the time, on the device.
        moved = jax.tree.map(
            lambda x, s: s.with_memory_kind("pinned_host") if x.ndim else s, shapes.opt_state, shardings.opt_state
        )
        shardings = dataclasses.replace(shardings, opt_state=moved)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def parameter_shardings(config: Config, mesh: AnyMesh, params: Any) -> Any:
    """Where each parameter lies, given their shapes. Raises ConfigError for layouts that fail."""
    table = rules(config.mesh)
    check_table(mesh, table)
    check_stages(config)
    return tree_shardings(params, stored_axes(config), mesh, table)


def stored_axes(config: Config) -> Any:
    """The logical axis names of each parameter, as the state has it."""
    axes = parameter_axes(config.model)
    if config.mesh.repeats > 1:
        axes["layers"] = jax.tree.map(
            lambda names: ("repeats", *names), axes["layers"], is_leaf=lambda node: isinstance(node, tuple)
        )
    return axes


def by_repeats(params: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Stacked layers [L, …] as [repeats, L / repeats, …], so that stages are parts of the second axis."""
    if repeats == 1:
        return params
    stacked = jax.tree.map(lambda x: x.reshape(repeats, -1, *x.shape[1:]), params["layers"])
    return params | {"layers": stacked}


def in_one_stack(params: dict[str, Any], repeats: int) -> dict[str, Any]:
    """The inverse of `by_repeats`."""
    if repeats == 1:
        return params
    flat = jax.jit(lambda layers: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), layers))
    return params | {"layers": flat(params["layers"])}


def check_stages(config: Config) -> None:
    """Raises ConfigError when the layers cannot be shared out evenly over a pipeline."""
    stage, repeats, period = config.mesh.stage, config.mesh.repeats, len(config.model.pattern)
    if stage > 1 and config.model.layers % (stage * repeats * period):
        parts = f"mesh.stage {stage}" + (f" x mesh.repeats {repeats}" if repeats > 1 else "")
        parts += f" x {period} layers of model.windows" if period > 1 else ""
        raise ConfigError(f"model.layers = {config.model.layers} cannot be shared out over {parts}")
