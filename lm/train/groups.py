"""Norms by group of parameters: which kind went first when a run broke, and how each depth of a model learns."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.model.config import ModelConfig
from lm.model.transformer import abstract_params
from lm.optim.optimizer import paths

DEPTHS = 8
"""Ranges of layers, at most: what is logged does not grow with the layers."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """Two ways to divide all parameters."""

    kinds: tuple[str, ...]
    """`embedding`, `attention/query`, …, each over all layers."""
    depths: tuple[str, ...]
    """`embedding`, `layers_00-03`, …, `output`: ranges of layers, and what stands before and after them."""


class Norms(NamedTuple):
    """float32, of a tree like the parameters; the norm of `kinds`, and that of `depths`, is `whole`."""

    whole: jax.Array
    kinds: jax.Array
    depths: jax.Array


@functools.cache
def groups_of(config: ModelConfig) -> Groups:
    """The groups of a model, in the order of `norms`."""
    tree = abstract_params(config)
    kinds = dict.fromkeys(_kind(path) for path in paths(tree))
    outside = dict.fromkeys(path[0] for path in paths(tree) if path[0] not in _LAYERS)
    ranges = _ranges(config)
    width = len(str(config.layers - 1))
    names = [
        f"layers_{one[0]:0{width}}-{one[-1]:0{width}}" if len(one) > 1 else f"layer_{one[0]:0{width}}" for one in ranges
    ]
    before = [name for name in outside if name in _BEFORE]
    return Groups(tuple(kinds), (*before, *names, *(name for name in outside if name not in before)))


def norms(tree: Any, config: ModelConfig) -> Norms:
    """Of gradients, updates or parameters, all of which are read once."""
    found = groups_of(config)
    kinds: dict[str, Any] = dict.fromkeys(found.kinds, 0.0)
    depths: Any = 0.0
    for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        squares = by_depth(path, jnp.square(leaf), config)
        depths += squares
        kinds[_kind(path)] += jnp.sum(squares)
    return Norms(jnp.sqrt(sum(kinds.values())), jnp.sqrt(jnp.stack([*kinds.values()])), jnp.sqrt(depths))


def by_depth(path: tuple[str, ...], leaf: jax.Array, config: ModelConfig) -> jax.Array:
    """[depths], the sums over a leaf of the parameters, or what is shaped like it."""
    which = depths_of(path, leaf, config)
    by_layer = jnp.sum(leaf, axis=range(which.ndim, leaf.ndim))
    # No product with zeros: what is not finite stays in its own range.
    own = which.reshape(-1, 1) == np.arange(len(groups_of(config).depths))
    return jnp.sum(jnp.where(own, by_layer.reshape(-1, 1), 0.0), axis=0)


def depths_of(path: tuple[str, ...], leaf: Any, config: ModelConfig) -> np.ndarray:
    """int [], or [layers], or [repeats, layers / repeats]: the number of the depth, by the axes stacked over layers."""
    depths, period = groups_of(config).depths, len(config.pattern)
    if path[0] not in _LAYERS:
        return np.array(depths.index(path[0]))
    whole = config.layers // period * period
    number = int(path[1])
    if path[0] == "last_layers":
        return layer_depths(config)[whole + number]
    which = layer_depths(config)[number:whole:period]
    return which if len(which) == leaf.shape[0] else which.reshape(leaf.shape[:2])  # by repeats


def layer_depths(config: ModelConfig) -> np.ndarray:
    """int [layers], the number of the depth that each is part of."""
    first = next(i for i, name in enumerate(groups_of(config).depths) if name.startswith("layer"))
    return first + np.repeat(np.arange(len(_ranges(config))), [len(one) for one in _ranges(config)])


_LAYERS = ("layers", "last_layers")
_BEFORE = ("embedding", "positions")


def _kind(path: tuple[str, ...]) -> str:
    return "/".join(path[2:] if path[0] in _LAYERS else path)


def _ranges(config: ModelConfig) -> list[range]:
    parts = np.array_split(np.arange(config.layers), min(config.layers, DEPTHS))
    return [range(int(part[0]), int(part[-1]) + 1) for part in parts]
