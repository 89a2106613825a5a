"""Layers that were saved as [L, …] and are wanted as [repeats, L / repeats, …], for another pipeline, or the other way
round: the same numbers in the same order."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm.checkpoint.digest import leaf_paths

T = TypeVar("T")


def restacked(saved: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether arrays of these shapes are the same but for how their first one or two axes are stacked."""
    inner = min(len(saved), len(wanted)) - 1
    return (
        tuple(saved) != tuple(wanted)
        and inner >= 1
        and abs(len(saved) - len(wanted)) <= 1
        and math.prod(saved) == math.prod(wanted)
        and any(tuple(saved[-n:]) == tuple(wanted[-n:]) for n in {inner, inner - 1} - {0})
    )


def stacked_as(abstract: T, shapes: Mapping[str, Sequence[int]]) -> T:
    """ShapeDtypeStructs like `abstract`, whose leaves have the `shapes` with which they were saved, by path."""
    leaves, structure = jax.tree.flatten(abstract)
    found = []
    for path, leaf in zip(leaf_paths(abstract), leaves, strict=True):
        saved = tuple(shapes[path])
        if saved != leaf.shape:
            leaf = jax.ShapeDtypeStruct(saved, leaf.dtype, sharding=_sharding(leaf, saved))
        found.append(leaf)
    return jax.tree.unflatten(structure, found)


def restack(state: T, abstract: T) -> T:
    """`state` in the shapes of `abstract`; array by array, so that little is held twice."""
    wanted = dict(zip(leaf_paths(abstract), jax.tree.leaves(abstract), strict=True))
    leaves, structure = jax.tree.flatten(state)
    found = []
    for path, leaf in zip(leaf_paths(state), leaves, strict=True):
        if leaf.shape != wanted[path].shape:
            shape = wanted[path].shape
            # On the device, of what is in the memory of the host no more than this.
            leaf = jax.jit(
                lambda x, s=shape: jax.device_put(x, jax.memory.Space.Device).reshape(s),
                out_shardings=wanted[path].sharding,
            )(leaf)
        found.append(leaf)
    return jax.tree.unflatten(structure, found)


def _sharding(leaf: jax.ShapeDtypeStruct, saved: tuple[int, ...]) -> NamedSharding:
    """Where the array lies as it was saved: stages have parts of the last stacked axis when they can."""
    inner = 1
    while inner < min(len(saved), leaf.ndim) and saved[-inner - 1 :] == leaf.shape[-inner - 1 :]:
        inner += 1
    sharding = leaf.sharding
    parts = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    stages = parts[leaf.ndim - inner - 1]
    count = math.prod(sharding.mesh.shape[axis] for axis in ((stages,) if isinstance(stages, str) else stages or ()))
    stacked = [None] * (len(saved) - inner - 1) + [stages if saved[-inner - 1] % count == 0 else None]
    spec = PartitionSpec(*stacked, *parts[leaf.ndim - inner :])
    return NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
