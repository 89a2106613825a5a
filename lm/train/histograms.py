"""How parameters, or what is shaped like them, are distributed at each depth of a model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.model.config import ModelConfig
from lm.optim.optimizer import parameter_group, paths
from lm.train.groups import by_depth, depths_of

BINS = 32
EDGES = np.linspace(-4.0, 4.0, BINS - 1)
"""In units of the root mean square; the first bin and the last are open."""


class Histograms(NamedTuple):
    """float32, for each of `groups_of(config).depths` [D], over matrices and embeddings."""

    scale: jax.Array
    """[D], the root mean square."""
    counts: jax.Array
    """[D, BINS]"""


def histograms(tree: Any, config: ModelConfig) -> Histograms:
    """All is read BINS times, and nothing is sorted or scattered, which accelerators are slow at."""
    leaves = [
        (path, leaf)
        for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)
        if parameter_group(path) != "vector"
    ]

    def total(what: Callable[[tuple[str, ...], jax.Array], jax.Array]) -> jax.Array:
        return sum((by_depth(path, what(path, leaf), config) for path, leaf in leaves), jnp.zeros(()))

    sizes = total(lambda _, leaf: jnp.ones(leaf.shape, jnp.float32))
    scale = jnp.sqrt(total(lambda _, leaf: jnp.square(leaf)) / jnp.maximum(sizes, 1))

    def below(edge: jax.Array) -> jax.Array:
        def is_below(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
            own = scale[depths_of(path, leaf, config)]
            return (leaf < edge * own.reshape(*own.shape, *[1] * (leaf.ndim - own.ndim))).astype(jnp.float32)

        return total(is_below)

    counted = jax.lax.map(below, jnp.asarray(EDGES, jnp.float32))  # [BINS - 1, D]
    ends = jnp.concatenate([jnp.zeros((1, len(sizes))), counted, sizes[None]])
    return Histograms(scale, jnp.diff(ends, axis=0).T)
