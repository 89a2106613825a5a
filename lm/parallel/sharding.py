"""The table from logical axis names to mesh axes, and the checks that make wrong layouts fail early."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.errors import ConfigError

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "all_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "positions": (),
    "layers": (),
}

LARGE_BYTES = 64 * 2**20
"""A parameter above this that no axis of a mesh of many devices splits is an error."""


def spec(axes: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, *, tensor: str) -> PartitionSpec:
    """Where the dimensions of one array go. Raises ConfigError naming tensor, axis and sizes."""
    parts: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, size in zip(axes, shape, strict=True):
        if name not in RULES:
            raise ConfigError(f"{tensor}: no rule for axis {name!r}; there are {', '.join(RULES)}")
        targets = tuple(axis for axis in RULES[name] if mesh.shape[axis] > 1)
        if used & set(targets):
            raise ConfigError(f"{tensor}: axes {axes} put two dimensions on mesh axis {(used & set(targets)).pop()}")
        used |= set(targets)
        split = math.prod(mesh.shape[axis] for axis in targets)
        if size % split:
            raise ConfigError(
                f"{tensor} {shape}: {name} of {size} cannot be split over mesh axes {' x '.join(targets)} of {split}"
            )
        parts.append(targets or None)
    return PartitionSpec(*parts)


def tree_shardings(shapes: Any, axes: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each array of a nested dict of shapes, given the tree of its axis names."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    shardings = []
    for (path, leaf), leaf_axes in zip(leaves, names, strict=True):
        tensor = ".".join(str(key.key) for key in path)
        sharding = NamedSharding(mesh, spec(leaf_axes, leaf.shape, mesh, tensor=tensor))
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 and size > LARGE_BYTES and sharding.is_fully_replicated:
            raise ConfigError(f"{tensor} {leaf.shape}: {size:,} bytes would be on every device; no rule splits it")
        shardings.append(sharding)
    return jax.tree.unflatten(structure, shardings)


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree (the state) that holds trees like the parameters somewhere inside.

    A leaf whose path ends with the path of a parameter of the same shape gets its sharding, any other (counts)
    is on every device.
    """
    table = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(shardings), strict=True
        )
    }

    def find(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = table.get(path[start:], (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(find, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the batch over all axes that carry data."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def check_batch(rows: int, mesh: Mesh) -> None:
    """Raises ConfigError when the rows computed at once cannot be shared out evenly."""
    spec(("batch",), (rows,), mesh, tensor="train.batch_size / train.accumulation")
