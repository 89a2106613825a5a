"""The table from logical axis names to mesh axes, and the checks that make wrong layouts fail early."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm.errors import ConfigError
from lm.parallel.mesh import AXES, AnyMesh, MeshConfig

Rules = dict[str, tuple[str, ...]]

RULES: Rules = {
    # What is computed: rows, and positions of the sequence inside of layers and between them
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("context",),
    "residual": ("context", "tensor"),
    # Parameters: dimensions that are computed in parts …
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "all_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "layers": ("stage",),
    # … those that are stored in parts and gathered for each use …
    "embed": ("fsdp", "expert", "context"),
    "expert_embed": ("fsdp", "context"),
    # … and those too small to split
    "features": (),
    "head_dim": (),
    "positions": (),
    "repeats": (),
}

LARGE_BYTES = 64 * 2**20
"""A parameter above this that no axis of a mesh of many devices splits is an error."""


def rules(config: MeshConfig) -> Rules:
    """The table with what the config replaces in it. Raises ConfigError for a name that is not in it."""
    table = dict(RULES)
    for rule in config.rules:
        if rule.name not in table:
            raise ConfigError(f"mesh.rules: nothing is named {rule.name!r}; there are {', '.join(RULES)}")
        table[rule.name] = rule.axes
    return table


def spec(
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    mesh: AnyMesh,
    table: Rules,
    *,
    tensor: str,
    size_in_bytes: int | None = None,
) -> PartitionSpec:
    """Where the dimensions of one array go. Raises ConfigError naming tensor, axis, sizes and, if known, bytes."""
    tensor = f"{tensor} {shape}" + ("" if size_in_bytes is None else f" of {size_in_bytes:,} bytes")
    parts: list[tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for name, size in zip(axes, shape, strict=True):
        if name not in table:
            raise ConfigError(f"{tensor}: no rule for axis {name!r}; there are {', '.join(table)}")
        targets = split_axes(name, mesh, table)
        for target in targets:
            if target in used:
                raise ConfigError(
                    f"{tensor}: {used[target]} and {name} would both be split over mesh axis {target}; "
                    "replace one of the two rules with --mesh.rules"
                )
            used[target] = name
        split = math.prod(mesh.shape[axis] for axis in targets)
        if size % split:
            over = " x ".join(targets) + (f" of {' x '.join(str(mesh.shape[axis]) for axis in targets)} =")
            raise ConfigError(
                f"{tensor}: {name} of {size} cannot be split over mesh axes {over} {split}; "
                f"{size} is divisible by {_divisors_near(size, split)}"
            )
        parts.append(targets or None)
    return PartitionSpec(*parts)


def split_axes(name: str, mesh: AnyMesh, table: Rules) -> tuple[str, ...]:
    """The axes of this mesh that split dimensions of a logical name."""
    return tuple(axis for axis in table[name] if mesh.shape[axis] > 1)


def tree_shardings(shapes: Any, axes: Any, mesh: AnyMesh, table: Rules) -> Any:
    """A NamedSharding for each array of a nested dict of shapes, given the tree of its axis names."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    shardings = []
    for (path, leaf), leaf_axes in zip(leaves, names, strict=True):
        tensor = ".".join(str(key.key) for key in path)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        where = spec(leaf_axes, leaf.shape, mesh, table, tensor=tensor, size_in_bytes=size)
        sharding = NamedSharding(mesh, where)
        if mesh.size > mesh.shape["data"] and size > LARGE_BYTES and sharding.is_fully_replicated:
            raise ConfigError(
                f"{tensor} {leaf.shape}: {size:,} bytes would be on every device; no rule splits {leaf_axes}"
            )
        shardings.append(sharding)
    return jax.tree.unflatten(structure, shardings)


def like_parameters(tree: Any, params: Any, shardings: Any, mesh: AnyMesh) -> Any:
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


def batch_sharding(mesh: AnyMesh, table: Rules = RULES) -> NamedSharding:
    """Rows of the batch over all axes that carry data; a device takes its part of the sequence itself."""
    return NamedSharding(mesh, PartitionSpec(split_axes("batch", mesh, table)))


def check_table(mesh: AnyMesh, table: Rules) -> None:
    """Raises ConfigError for a table whose devices would compute the same thing twice, or could not compute."""
    residual, sequence = (split_axes(name, mesh, table) for name in ("residual", "sequence"))
    if residual[: len(sequence)] != sequence:
        raise ConfigError(f"mesh.rules: residual {residual} must begin with the axes of sequence {sequence}")
    if set(residual[len(sequence) :]) - {"tensor"} or set(sequence) - {"context"}:
        raise ConfigError("mesh.rules: sequence may be split over context, residual over context and tensor")
    busy = {*split_axes("batch", mesh, table), *residual, *split_axes("layers", mesh, table)}
    for axis in AXES:
        if mesh.shape[axis] > 1 and axis not in busy:
            raise ConfigError(
                f"mesh.{axis} is {mesh.shape[axis]}, but the rules for batch, residual and layers do not use it: all "
                "its devices would compute the same"
            )
    if split_axes("layers", mesh, table) != (("stage",) if mesh.shape["stage"] > 1 else ()):
        raise ConfigError(f"mesh.rules: layers is over stage, where they are computed in turn; got {table['layers']}")
    for name in ("vocab", "heads", "kv_heads", "all_heads", "mlp"):
        if set(split_axes(name, mesh, table)) - {"tensor"}:
            raise ConfigError(f"mesh.rules: {name} is computed in parts, over tensor or not at all; got {table[name]}")
    if len({split_axes(name, mesh, table) for name in ("heads", "kv_heads", "all_heads")}) > 1:
        raise ConfigError("mesh.rules: heads, kv_heads and all_heads meet in attention: split all, or none")
    for name in ("residual", "layers", "vocab", "heads", "kv_heads", "all_heads", "mlp"):
        for axis in split_axes(name, mesh, table):
            if axis in split_axes("batch", mesh, table):
                raise ConfigError(f"mesh.rules: batch and {name} cannot both be split over {axis}: replace one of them")
    for name in ("embed", "expert_embed"):
        if set(split_axes(name, mesh, table)) & {"tensor", "stage"}:
            raise ConfigError(
                f"mesh.rules: {name} is gathered for use, over data, fsdp, expert, context; got {table[name]}"
            )
    for name in ("features", "head_dim", "positions", "repeats"):
        if split_axes(name, mesh, table):
            raise ConfigError(f"mesh.rules: {name} cannot be split; got {table[name]}")


def _divisors_near(size: int, split: int) -> str:
    divisors = [d for d in range(1, min(size, 4 * split) + 1) if size % d == 0]
    return ", ".join(map(str, sorted(sorted(divisors, key=lambda d: abs(d - split))[:3])))
