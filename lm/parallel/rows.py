"""Which rows of a batch a process reads, and how its rows become part of the batch on all devices."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Sharding


def local_rows(sharding: Sharding, count: int) -> np.ndarray:
    """int64 [n], ascending: which of `count` rows the devices of this process hold. They need not be neighbours."""
    return rows_of(sharding.addressable_devices_indices_map((count,)).values(), count)


def rows_of(indices: Iterable[tuple[slice, ...] | None], count: int) -> np.ndarray:
    """int64 [n], ascending: what devices hold together whose parts of the rows these indices are."""
    held = np.zeros(count, np.bool_)
    for index in indices:
        held[index[0] if index else slice(None)] = True
    return np.flatnonzero(held)


def whole_batch(
    part: Mapping[str, np.ndarray], rows: np.ndarray, count: int, sharding: Sharding
) -> dict[str, jax.Array]:
    """The batch of `count` rows on all devices, of which each process gives its own `rows` [n, …].

    Returns at once; the copies to the devices go on.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(dict(part), sharding)
    place = np.zeros(count, np.int64)
    place[rows] = np.arange(len(rows))

    def array(x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            first, *others = index or (slice(None),)
            return x[place[first]][(slice(None), *others)]

        return jax.make_array_from_callback((count, *x.shape[1:]), sharding, shard)

    return {name: array(x) for name, x in part.items()}
