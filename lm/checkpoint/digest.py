"""A digest of a state: equal exactly when two states are bit for bit the same, however they are sharded.

Every element gives four 32-bit numbers, mixed from its bits and from where it stands in its array; each of
the four is summed modulo 2^32 over the array. A sum does not depend on the order or on the split over
devices, so the arrays stay where they are, are read once, and nothing of their size is allocated. It finds
accidents (a chance of 2^-128 to miss one), not forgeries.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lm.checkpoint.manifest import LeafDigest, StateDigest
from lm.parallel.replicated import replicated

_Results = tuple[list[jax.Array], list[jax.Array], list[jax.Array]]
"""Of each array the lanes, and whether it is finite; and the values of those without dimensions."""


def prepare_digest(abstract: Any) -> None:
    """Compiles what digests states of these shapes, dtypes and shardings, so that no later call has to."""
    _program(jax.tree.leaves(abstract))


def state_digest(state: Any) -> StateDigest:
    """Digest of a pytree of arrays: booleans, integers, floats of 8 to 64 bits; any shapes and shardings."""
    return start_digest(state)()


def start_digest(state: Any) -> Callable[[], StateDigest]:
    """Starts the digest on the devices; the call that is returned waits for it.

    The arrays may be donated as soon as this returns.

    Raises TypeError for arrays of other types, such as complex numbers and typed random keys.
    """
    paths, leaves = leaf_paths(state), jax.tree.leaves(state)
    for path, x in zip(paths, leaves, strict=True):
        if x.dtype != jnp.bool_ and not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.integer, jnp.floating)):
            raise TypeError(f"{path}: no digest for arrays of type {x.dtype}")
    kinds = [(x.shape, x.dtype.name) for x in leaves]  # what `finish` holds must not keep arrays alive
    lanes, finite, scalars = _program(leaves)(leaves)

    def finish() -> StateDigest:
        digests = {
            path: LeafDigest(shape, dtype, np.asarray(sums).astype(">u4").tobytes().hex())
            for path, (shape, dtype), sums in zip(paths, kinds, lanes, strict=True)
        }
        lines = sorted(f"{path}\t{leaf.dtype}{leaf.shape}\t{leaf.lanes}\n" for path, leaf in digests.items())
        nonfinite = tuple(path for path, good in zip(paths, finite, strict=True) if not bool(good))
        names = [path for path, (shape, _) in zip(paths, kinds, strict=True) if not shape]
        values = {path: np.asarray(value).item() for path, value in zip(names, scalars, strict=True)}
        return StateDigest(hashlib.sha256("".join(lines).encode()).hexdigest(), digests, values, nonfinite)

    return finish


def leaf_paths(tree: Any) -> list[str]:
    """Names of the leaves in order, such as `opt_state/0/mu/layers/kernel`."""
    return [
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _program(leaves: Sequence[Any]) -> Callable[[list[jax.Array]], _Results]:
    """The compiled program for arrays of these kinds."""
    # An array that nobody placed goes where the others are.
    return _compiled(tuple((x.shape, x.dtype, x.sharding if getattr(x, "committed", True) else None) for x in leaves))


@functools.lru_cache(maxsize=8)
def _compiled(kinds: tuple[Any, ...]) -> Callable[[list[jax.Array]], _Results]:
    leaves = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype, sharding in kinds]
    everywhere = replicated(leaves)

    def digest_of_state(leaves: list[jax.Array]) -> _Results:
        results = [reduce_to_lanes(x) for x in leaves]
        scalars = [x for x in leaves if not x.ndim]
        if everywhere is not None:
            results, scalars = lax.with_sharding_constraint((results, scalars), everywhere)
        return [lanes for lanes, _ in results], [finite for _, finite in results], scalars

    return jax.jit(digest_of_state).lower(leaves).compile()


# Odd numbers without structure: fractional digits of the golden ratio and multipliers of published hashes.
_SALT = (0x9E3779B9, 0x7F4A7C15, 0xBF58476D, 0x94D049BB)
_POSITION = (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)
_BLOCK = (0xCC9E2D51, 0x1B873593, 0xE6546B65, 0x9E3779B1)


def reduce_to_lanes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Four lane sums, uint32 [4], and whether all elements are finite."""
    x = jax.device_put(x, jax.memory.Space.Device)  # it may lie in the memory of the host
    finite = jnp.isfinite(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.ones_like(x, jnp.bool_)
    bits = _bits(x)
    if bits.ndim > x.ndim:  # elements of 64 bits: two words each
        finite = jnp.broadcast_to(finite[..., None], bits.shape)
    lanes = tuple(_lanes(bits))
    # One reduction of five operands, since XLA reads the array once for it; for five reductions it
    # writes the mixed values to memory first.
    zero = np.uint32(0)
    *sums, all_finite = lax.reduce(
        (*lanes, finite),
        (zero, zero, zero, zero, np.bool_(True)),
        lambda a, b: (*(i + j for i, j in zip(a[:4], b[:4], strict=True)), a[4] & b[4]),
        tuple(range(bits.ndim)),
    )
    return jnp.stack(sums), all_finite


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, word).astype(jnp.uint32)


def _lanes(bits: jax.Array) -> Iterator[jax.Array]:
    """Each lane mixes the bits with the index, whose second word is over the leading dimensions.

    The second word only comes in above 2^32 elements.
    """
    split = bits.ndim
    while split and math.prod(bits.shape[split - 1 :]) <= 2**32:
        split -= 1
    position = _mix(_index(bits.shape, range(split, bits.ndim)))
    for salt, factor, block in zip(_SALT, _POSITION, _BLOCK, strict=True):
        word = bits + np.uint32(salt)
        if split:
            word += _index(bits.shape, range(split)) * np.uint32(block)
        yield _mix(word ^ (position * np.uint32(factor)))


def _index(shape: tuple[int, ...], dims: range) -> jax.Array:
    """Row-major index over some of the dimensions, modulo 2^32, in the shape of the whole."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for dim in reversed(dims):
        index += lax.broadcasted_iota(jnp.uint32, shape, dim) * np.uint32(stride % 2**32)
        stride *= shape[dim]
    return index


def _mix(h: jax.Array) -> jax.Array:
    """A bijection that lets every bit depend on every other: from github.com/skeeto/hash-prospector."""
    h = (h ^ (h >> 16)) * np.uint32(0x21F0AAAD)
    h = (h ^ (h >> 15)) * np.uint32(0xD35A2D97)
    return h ^ (h >> 15)
