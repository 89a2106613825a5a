"""Everything that changes during training, as one pytree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm.experiment import Config
from lm.model.transformer import init_params, parameter_axes
from lm.optim.optimizer import optimizer
from lm.parallel.sharding import like_parameters, tree_shardings


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "skipped", "bad_streak"],
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
    """int32, steps that were not applied because something was not finite."""
    bad_streak: jax.Array
    """int32, how many of them came last, in a row."""


def init_state(config: Config, key: jax.Array) -> TrainState:
    """The state at step 0. To be jitted with the shardings of `abstract_state`."""
    params = init_params(config.model, key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer(config.optim).init(params), zero, zero)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing. Raises ConfigError for layouts that fail."""
    shapes = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
    params = tree_shardings(shapes.params, parameter_axes(config.model), mesh)
    shardings = like_parameters(shapes, shapes.params, params, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
