"""Norms of the gradient by group of parameters: they tell which part of a model went first."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.experiment import Config
from lm.model.transformer import init_params
from lm.optim.optimizer import paths


def gradient_groups(config: Config) -> tuple[str, ...]:
    """The groups that `group_norms` has the norms of: `embedding`, `attention/query`, …, each over all layers."""
    return tuple(_groups(jax.eval_shape(functools.partial(init_params, config.model), jax.random.key(0))))


def group_norms(gradients: Any) -> jax.Array:
    """float32 [groups], whose own norm is that of the whole gradient.

    The sums over arrays are those that `optax.tree.norm` makes: where both are computed, the compiler does so once.
    """
    squares = [optax.tree.norm(leaf, squared=True) for leaf in jax.tree.leaves(gradients)]
    return jnp.sqrt(jnp.stack([sum(squares[i] for i in which) for which in _groups(gradients).values()]))


def _groups(params: Any) -> dict[str, list[int]]:
    """By name, the indices of the leaves."""
    found: dict[str, list[int]] = {}
    for i, path in enumerate(paths(params)):
        name = "/".join(path[2:] if path[0] in ("layers", "last_layers") else path)
        found.setdefault(name, []).append(i)
    return found
